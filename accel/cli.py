"""The command line. Progress goes to stderr, text to stdout; the last line of stdout is one JSON document."""

# Torch takes seconds to import, so commands import it after their arguments are checked (tests/test_startup.py).

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import typer
import yaml
from tqdm import tqdm
from typer.exceptions import TyperException

from .errors import AccelError, explain_os_error
from .files import all_or_nothing, only_writer, read_utf8, write_json
from .runtime.models import TINY

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None, help=__doc__)
world = typer.Typer(no_args_is_help=True, help="The captioned toy world: render samples, judge videos.")
app.add_typer(world, name="world")

Prompt = Annotated[str, typer.Option(help="What to generate; tiny-wan knows examples/prompts/toy.txt.")]
Seed = Annotated[int, typer.Option(help="Seed of the initial noise, or of the sampled scenes.")]
PresetName = Annotated[
    str,
    typer.Option("--preset", help="A name in presets/, a YAML file or none; default: none with --set, else stepcache."),
]
Sets = Annotated[list[str], typer.Option("--set", help="Change a parameter: fastercache.attention_interval=3; repeat.")]
Steps = Annotated[int, typer.Option(help="Denoising steps; default: the preset's, else the model's.")]
Guidance = Annotated[float, typer.Option(help="Guidance scale; default: the preset's, else the model's.")]
SolverName = Annotated[str, typer.Option("--solver", help="default (the model's), unipc, euler, dpm++2m or dpm++2s.")]
Shift = Annotated[float, typer.Option(help="Flow shift of the noise levels; default: the preset's, else the model's.")]
Model = Annotated[str, typer.Option(help="Folder or Hugging Face id of a diffusers pipeline.")]
Size = Annotated[int, typer.Option(min=1, help="In pixels, or the number of frames; default: the model's.")]
Out = Annotated[Path, typer.Option(help="Folder for the results; made if missing.")]
# What run, compare and report leave in a folder; new results remove it.
RESULT_FILES = tuple("video.mp4 frames.npy a.mp4 b.mp4 a.npy b.npy a.jpg b.jpg run.json report.zip".split())
INTERRUPTED = 130  # exit code after Ctrl-C
JUDGED_WIDTH = 96  # columns: in fewer, small shapes cannot be told apart, and more tell the judge nothing
DEFAULT_PRESET = "stepcache"
RUN_OPTIONS = ("steps", "guidance", "solver", "shift")  # settings of a run that a preset may hold


def main() -> None:
    """Run a command. Bad input ends with one line on stderr and exit code 2, a full disk with code 1."""
    try:
        code = app(standalone_mode=False)
        if code == INTERRUPTED:
            _fail("stopped", code)
        sys.exit(code if isinstance(code, int) else 0)
    except TyperException as error:  # wrong arguments; without arguments its text is the help
        text = error.format_message()
        print(text if "Usage:" in text else f"error: {text}", file=sys.stderr)
        sys.exit(2)
    except AccelError as error:
        _fail(str(error), 1 if getattr(error.__cause__, "errno", None) else 2)  # the system's refusal, or bad input
    except (FileNotFoundError, FileExistsError, NotADirectoryError) as error:
        _fail(explain_os_error(error), 2)
    except OSError as error:
        _fail(explain_os_error(error), 1)


def _fail(sentence: str, code: int) -> None:
    print(f"error: {sentence}", file=sys.stderr)
    sys.exit(code)


def print_json(document: dict) -> None:
    """The last line of a command's output."""
    print(json.dumps(document))


def parse_settings(preset: str | None, changes: list[str] | None, axes: Sequence[str] = ()) -> dict:
    """Methods and run settings of a preset, with the `--set` changes applied and checked.

    Without a preset it is the default one, but none where `changes` or the names of `axes` say which methods run.
    """
    from .runtime.presets import Preset, build_methods, load_preset, with_parameter

    named = {text.partition(".")[0] for text in (*(changes or ()), *axes) if "." in text.partition("=")[0]}
    preset = preset or ("none" if named - {DEFAULT_PRESET} or "preset" in axes else DEFAULT_PRESET)
    loaded = load_preset(preset) if preset != "none" else Preset()
    methods = {name: dict(parameters or {}) for name, parameters in loaded.methods.items()}
    for change in changes or []:
        target, _, value = change.partition("=")
        name, _, parameter = target.partition(".")
        if not (parameter and value):
            raise AccelError(f"--set {change!r} is not understood: write method.parameter=value")
        try:
            parsed = yaml.safe_load(value)
        except yaml.YAMLError:
            raise AccelError(f"--set {change!r} is not understood: put the value into quotes") from None
        if loaded.methods:
            methods = with_parameter(methods, name, parameter, parsed)
        else:  # the order in which they are written
            methods.setdefault(name, {})[parameter] = parsed
    build_methods(methods)
    return {"methods": methods, **loaded.model_dump(include=set(RUN_OPTIONS))}


def first_example(model: str) -> str:
    """The first of a model's example prompts."""
    from .runtime.example_prompts import example_prompts
    from .runtime.models import read_defaults

    return example_prompts(read_defaults(model))[0]


def load_for(model: str, make_runs: Callable) -> tuple:
    """Pipeline, defaults and runs `make_runs(defaults)` of a model.

    Raises AccelError before the model is loaded where its files tell that a run is not possible.
    """
    from .runtime.models import check_model, load_pipeline, model_defaults, read_defaults
    from .runtime.run import check_size, check_size_from_files

    check_model(model)
    if defaults := read_defaults(model):
        for run in make_runs(defaults):
            check_size_from_files(run)
    pipe = load_pipeline(model)
    defaults = defaults or model_defaults(pipe, model)
    for run in (runs := make_runs(defaults)):
        check_size(run, pipe)
    return pipe, defaults, runs


def pair_maker(
    settings: dict, steps: int | None, guidance: float | None, common: dict, *, separate: bool,
    solver: str | None = None, shift: float | None = None,
) -> Callable:  # fmt: skip
    """A function of the defaults that returns the runs a (baseline) and b (with the methods of `settings`).

    `separate`: where b runs a student, steps and guidance that it requires, solver and shift apply to a alone.
    """
    from .runtime.presets import required_settings
    from .runtime.run import build_run

    required = required_settings(settings["methods"]) if separate else {}
    of_a_alone = {*required, "solver", "shift"} if required else set()
    given = dict(zip(RUN_OPTIONS, (steps, guidance, solver, shift)))
    of_b = {key: settings[key] if value is None else value for key, value in given.items() if key not in of_a_alone}
    return lambda defaults: (
        build_run(defaults, **common, **given),
        build_run(defaults, **common, methods=settings["methods"], **of_b),
    )


def print_messages(messages: list[str], printed: list[str]) -> None:
    """What the methods reported in a run, without what was printed before it."""
    for message in messages:
        if message not in printed:
            print(message)


@app.command()
def run(
    context: typer.Context,
    prompt: Prompt = None, seed: Seed = 0, preset: PresetName = None, set_: Sets = None,
    steps: Steps = None, guidance: Guidance = None, solver: SolverName = None, shift: Shift = None, model: Model = TINY,
    height: Size = None, width: Size = None, frames: Size = None,
    source: Annotated[Path, typer.Option("--from", help="Repeat the run stored in a video made here.")] = None,
    out: Out = Path("runs/run"),
) -> None:  # fmt: skip
    """Generate one video with a preset: video.mp4, frames.npy and run.json in --out, all of them or none."""
    from .runtime.run import build_run

    if source is not None:
        given = [name for name in context.params if context.get_parameter_source(name).name == "COMMANDLINE"]
        if more := [name.rstrip("_") for name in given if name not in ("source", "out")]:
            raise AccelError(f"--from repeats a video as it was made: leave --{', --'.join(more)} out")
        if source.parent.resolve() == out.resolve() and source.name in RESULT_FILES:
            raise AccelError(f"{source} would be replaced by what is made from it: give another --out")
        stored = read_run(source)
        model, make_runs = stored["model"], lambda defaults: (build_run(defaults, **stored),)
    elif prompt is None:
        raise AccelError("give a --prompt, or a video to repeat with --from")
    else:
        common = dict(model=model, prompt=prompt, seed=seed, height=height, width=width, frames=frames)
        options = dict(separate=False, solver=solver, shift=shift)
        make_pair = pair_maker(parse_settings(preset, set_), steps, guidance, common, **options)
        make_runs = lambda defaults: make_pair(defaults)[1:]
    pipe, defaults, (b,) = load_for(model, make_runs)
    import numpy as np

    from .runtime.generate import environment, generate, preflight, warm_up
    from .runtime.video import write_mp4

    print_messages(printed := preflight(b, pipe), [])
    with all_or_nothing(out, "run.json", RESULT_FILES) as part:
        warm_up(b, pipe, defaults)
        with tqdm(total=b.steps, desc="denoising") as bar:
            video = generate(b, pipe, defaults, lambda *_: bar.update())
        video.seconds["encode"] = write_mp4(part / "video.mp4", video.frames, defaults.fps, b.model_dump())
        np.save(part / "frames.npy", video.frames)
        document = {**b.model_dump(), **environment(pipe), "seconds": video.seconds, "trace": video.trace.to_json()}
        write_json(part / "run.json", document)
    print_messages(video.trace.messages, printed)
    work = video.trace.summary()["flops_ratio"]
    print(f"{video.seconds['denoise']:.2f} s of denoising, {work:.0%} of the work of these steps -> {out}")
    print_json({**b.model_dump(), "seconds": video.seconds, "flops_ratio": work, "out": str(out)})


def read_run(source: Path) -> dict:
    """The run stored in a video. Raises AccelError if it holds none."""
    from .runtime.video import read_settings

    stored = read_settings(source)
    if "model" not in stored:
        raise AccelError(f"{source} was not made by `accel run` or `compare`: it holds no run to repeat")
    return stored


@app.command()
def compare(
    prompt: Prompt, seed: Seed = 0, preset: PresetName = None, set_: Sets = None,
    steps: Steps = None, guidance: Guidance = None, solver: SolverName = None, shift: Shift = None, model: Model = TINY,
    height: Size = None, width: Size = None, frames: Size = None,
    repeats: Annotated[int, typer.Option(min=1, max=100, help="Times that a and b are generated in turn.")] = 3,
    out: Out = Path("runs/compare"),
) -> None:  # fmt: skip
    """Generate a (baseline) and b (with the preset) from the same noise, into --out.

    With a preset that brings its own steps (a student, a fitted solver), --steps, --solver and --shift are those of a
    alone, with a student also --guidance. Files, all or none: a.mp4 b.mp4, their frames a.npy b.npy, previews of the
    denoising a.jpg b.jpg, and run.json.
    """
    common = dict(model=model, prompt=prompt, seed=seed, height=height, width=width, frames=frames)
    options = dict(separate=True, solver=solver, shift=shift)
    make_runs = pair_maker(parse_settings(preset, set_), steps, guidance, common, **options)
    pipe, defaults, (a, b) = load_for(model, make_runs)
    import numpy as np

    from .evaluation.compare import compare as compare_runs
    from .runtime.generate import preflight
    from .runtime.video import write_mp4

    runs = {"a": a, "b": b}
    print_messages(printed := preflight(b, pipe), [])
    with all_or_nothing(out, "run.json", RESULT_FILES) as part:

        def write(pane: str, video) -> None:
            file, settings = part / f"{pane}.mp4", runs[pane].model_dump()
            video.seconds["encode"] = write_mp4(file, video.frames, defaults.fps, settings)
            np.save(part / f"{pane}.npy", video.frames)

        with tqdm(total=repeats * (a.steps + b.steps), desc="a and b in turn") as bar:
            count = lambda pane, *_: bar.update(pane != "warm-up")
            pair = compare_runs(a, b, pipe, defaults, repeats, count, write)
        for pane, video in (("a", pair.a), ("b", pair.b)):
            (part / f"{pane}.jpg").write_bytes(video.race.sheet)
        write_json(part / "run.json", pair.report)
    print(summary_text(pair.report, repeats))
    print_messages(pair.b.trace.messages, printed)
    print_json(pair.report)


def summary_text(report: dict, repeats: int) -> str:
    """The figures of a comparison in two lines."""
    from .evaluation.metrics import metric_texts

    r, (low, high) = report, report["speedup_range"]
    quality = "; ".join(f"{value} {about}" for value, about in metric_texts(r))
    return (
        f"denoise {r['speedup_denoise']:.2f}x [{low:.2f}, {high:.2f}], total {r['speedup_total']:.2f}x, "
        f"work {r['work_ratio']:.0%}, efficiency {r['efficiency']:.2f}; {quality}\n"
        f"n={repeats}, {r['device']}, {r['threads']} threads, {r['dtype']}; "
        f"slowest over fastest baseline: {r['baseline_jitter']:.2f}"
    )


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="Folder that `compare` wrote.")],
    out: Annotated[Path, typer.Option(help="The zip; default: report.zip in the folder.")] = None,
) -> None:
    """Make a zip of a pair that opens without a network: the videos, one with both, figures, settings, a page."""
    from .evaluation.pair_report import write_report

    out = out or folder / "report.zip"
    out.parent.mkdir(parents=True, exist_ok=True)
    write_report(folder, out)
    print_json({"out": str(out), "bytes": out.stat().st_size})


@app.command()
def bench(
    suite: Annotated[str, typer.Option(help="What to measure; a wrong name lists the suites.")] = "base",
    prompts: Annotated[int, typer.Option(min=1, help="Held-out prompts of the toy world, for any model.")] = 64,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds for each prompt.")] = 1,
    model: Model = TINY,
    out: Annotated[Path, typer.Option(help="Folder for the results; default: runs/bench/SUITE.")] = None,
) -> None:  # fmt: skip
    """Measure a suite on held-out prompts: results.json, report.md and pareto.png in --out. Resumable.

    Processes share the work: torchrun --nproc_per_node 2 -m accel bench ...
    """
    from .evaluation.suites import check_suite
    from .runtime.models import check_model

    check_suite(suite)
    check_model(model)
    from accelerate import PartialState

    from .evaluation.bench import run_suite

    if summary := run_suite(suite, prompts, seeds, model, out or Path("runs/bench") / suite):
        print_json(summary)
    PartialState().destroy_process_group()


@app.command()
def tune(
    max_loss: Annotated[
        float, typer.Option(min=0, max=1, help="Write one preset: the fastest that loses at most so much SSIM.")
    ] = None,
    trials: Annotated[int, typer.Option(min=1, help="Settings to try; more find better ones.")] = 150,
    prompts: Annotated[int, typer.Option(min=1, help="Tuning prompts of the toy world; default: 4.")] = None,
    prompt_file: Annotated[Path, typer.Option(exists=True, dir_okay=False, help="Prompts instead, one a line.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the search.")] = 0,
    model: Model = TINY,
    out: Out = Path("runs/tune"),
) -> None:  # fmt: skip
    """Search methods, steps, solver and shift for the least loss at every speed: front.json and presets in --out.

    Work is counted, not timed, so nothing has to be quiet. Ctrl-C keeps the tries; the same command goes on.
    """
    if prompt_file and prompts:
        raise AccelError("--prompt-file and --prompts do not go together: the file says which prompts there are")
    texts = read_prompts(prompt_file, model) if prompt_file else []
    pipe, defaults, _ = load_for(model, lambda defaults: [])
    from .evaluation.front import CLASSES
    from .evaluation.suites import TUNING_SEED
    from .evaluation.tune import at_least, fastest, front, front_table, tune, write_preset
    from .world.scene import held_out_prompts

    texts = texts or held_out_prompts(prompts or 4, TUNING_SEED)  # no report uses these
    with only_writer(out):
        tries = tune(model, pipe, defaults, texts, trials, seed, out)
        rows = front(tries)
        chosen = {f"front-{speed:g}x": at_least(rows, speed) for speed in CLASSES}
        if max_loss is not None:
            chosen = {f"loss-{max_loss:g}": fastest(tries, max_loss)}
        chosen = {name: row for name, row in chosen.items() if row}
        for name, row in chosen.items():
            write_preset(row, out / f"{name}.yaml", len(texts), trials)
    print(front_table(chosen))
    print_json({"out": str(out), "presets": {name: str(out / f"{name}.yaml") for name in chosen}, "rows": rows})


def read_prompts(file: Path, model: str) -> list[str]:
    """The prompts of a text file, one a line. Raises AccelError if there are none, or if one is not allowed."""
    from .runtime.models import ModelDefaults
    from .runtime.run import build_run

    lines = [line.strip() for line in read_utf8(file).split("\n") if line.strip()]
    if not lines:
        raise AccelError(f"{file} has no prompt: write one a line")
    for line in lines:
        build_run(ModelDefaults(), model=model, prompt=line)
    return lines


@app.command()
def sweep(
    axis: Annotated[list[str], typer.Option(help="steps=20,30,50 or gpd.steps=6..16; once or twice.")],
    prompt: Annotated[str, typer.Option(help="What to generate; default: the first example of the model.")] = None,
    seed: Seed = 0, preset: PresetName = None, set_: Sets = None,
    steps: Steps = None, guidance: Guidance = None, solver: SolverName = None, shift: Shift = None, model: Model = TINY,
    height: Size = None, width: Size = None, frames: Size = None,
    plain_steps: Annotated[str, typer.Option(help="Also measure the baseline in these steps: 10,20,30.")] = "",
    out: Out = Path("runs/sweep"),
) -> None:  # fmt: skip
    """Measure the values of one or two axes against one baseline: results.json, pareto.png, folders. Resumable."""
    from .evaluation.sweep import check_available, expand, parse_axis_option, parse_steps
    from .runtime.run import build_run

    prompt = prompt or first_example(model)
    common = dict(model=model, prompt=prompt, height=height, width=width, frames=frames)
    reference = {"seed": seed, **dict(zip(RUN_OPTIONS, (steps, guidance, solver, shift)))}
    axes = [parse_axis_option(option) for option in axis]
    if (preset or set_) and any(each.name == "preset" for each in axes):
        raise AccelError("--preset and --set do not go together with an axis of presets: leave them out")
    base = {**parse_settings(preset, set_, [each.name for each in axes]), "seed": seed}
    base |= {key: value for key, value in reference.items() if value is not None}
    cells = expand(base, axes, reference, parse_steps(plain_steps))
    for cell in cells:
        check_available(cell, model)
    make_runs = lambda defaults: [
        build_run(defaults, **common, **settings)
        for cell in cells
        for settings in ({**reference, "seed": cell.settings["seed"]}, cell.settings)
    ]
    pipe, defaults, runs = load_for(model, make_runs)
    from .evaluation.sweep_run import run_sweep, sweep_table

    with only_writer(out):
        results = run_sweep(list(zip(cells, runs[::2], runs[1::2])), pipe, defaults, out)
    print(sweep_table(results["rows"]))
    print_json({**results, "out": str(out)})


@app.command()
def profile(
    model: Model = TINY,
    prompts: Annotated[int, typer.Option(min=1, help="Prompts that costs are averaged over.")] = 4,
    steps: Steps = None,
    out: Annotated[Path, typer.Option(help="Folder for the tables and the plot.")] = Path("runs/profile"),
) -> None:  # fmt: skip
    """Measure what removing tokens costs in each block: asymrnr.json for AsymRnR, a table and a plot. Resumable."""
    from .runtime.models import check_model

    check_model(model)
    from .evaluation.asymrnr_profile import run_profile

    with only_writer(out):
        print_json(run_profile(model, prompts, steps, out))


@app.command()
def calibrate(
    model: Model = TINY,
    prompt: Annotated[str, typer.Option(help="What to generate; default: the first example of the model.")] = None,
    seed: Seed = 0,
    steps: Steps = None,
    out: Out = Path("runs/calibrate"),
) -> None:
    """Measure in one run the ratios that diffusers' MagCache needs: magcache.json, also in the folder of the model."""
    from .runtime.models import check_model

    check_model(model)
    from .evaluation.magcache_ratios import run_calibration

    prompt = prompt or first_example(model)
    print_json(run_calibration(model, prompt, seed, steps, out))


@app.command()
def fit(
    steps: Annotated[list[int], typer.Argument(min=1, help="Step counts of 4-8, 10, 12, 14, 16, 20, 25, 33.")],
    model: Model = TINY,
    prompts: Annotated[int, typer.Option(min=1, help="Prompts whose baselines the solvers are fitted to.")] = 8,
    uncond_share: Annotated[
        float, typer.Option(min=0.05, max=1, help="Share of the steps that run the unconditional branch.")
    ] = 1.0,
    guidance: Guidance = None,
    tries: Annotated[
        int, typer.Option(min=0, help="Lists of steps to try after five spacings; a list takes half as long as one.")
    ] = 40,
    out: Out = Path("runs/fit"),
) -> None:  # fmt: skip
    """Fit solvers of few steps to the model's own trajectories: a JSON file each, also in the folder of the model.

    No training: for each step a least-squares problem. With 40 tries, a solver takes as long as some ten baselines of
    each prompt.
    """
    from .runtime.models import check_model

    check_model(model)
    from .evaluation.solver_fit import run_fit

    print_json(run_fit(model, steps, uncond_share, guidance, prompts, tries, out))


@app.command()
def gpu(
    layout: Annotated[str, typer.Option(help="Only this one of ltx, cogvideox-2b and wan-1.3b.")] = None,
    steps: Annotated[int, typer.Option(min=10, help="Denoising steps; in fewer, methods do not act.")] = 10,
    repeats: Annotated[int, typer.Option(min=1, help="Times that all settings are generated in turn.")] = 1,
    small: Annotated[bool, typer.Option("--small", help="Tiny models, to try the command on a CPU.")] = False,
    out: Out = Path("runs/gpu"),
) -> None:  # fmt: skip
    """Time the methods on random weights in real models' sizes, with plain and compiled blocks, on a GPU."""
    from .evaluation.gpu import run_gpu

    with only_writer(out):
        print_json(run_gpu(layout, steps, repeats, small, out))


@app.command()
def docs() -> None:
    """Fill the generated tables of README.md, docs/ and the model card."""
    from .evaluation.docs import write

    print_json({"changed": [str(page) for page in write()]})


@app.command()
def train(
    what: Annotated[str, typer.Argument(help="vae, base, gpd, meanflow, predictor or all.")],
    minutes: Annotated[float, typer.Option(help="Stop after this many minutes; --resume continues.")] = None,
    resume: Annotated[
        bool, typer.Option(help="Continue from the last checkpoint; without one, vae, base and gpd from their weights.")
    ] = False,
    out: Out = Path("checkpoints"),
    setting: Annotated[str, typer.Option(help="small (for a CPU) or large (for a GPU); default: by device.")] = None,
    export: Annotated[bool, typer.Option(help="With base: only write the EMA weights of its last checkpoint.")] = False,
    model: Annotated[str, typer.Option(help="For students: another model to distill, with LoRA.")] = None,
    prompts: Annotated[Path, typer.Option(help="With --model: a text file of prompts, one per line.")] = None,
    rank: Annotated[int, typer.Option(min=0, help="With --model: rank of the LoRA, 64; 0: all weights.")] = None,
    videos: Annotated[Path, typer.Option(help="For meanflow: a folder of videos with captions.json.")] = None,
    trajectories: Annotated[int, typer.Option(min=1, help="With --model: trajectories over all processes.")] = None,
    ablation: Annotated[str, typer.Option(help="A variant of a student: see docs/training.md.")] = None,
) -> None:
    """Train the shipped model: the autoencoder, the transformer with its text encoder, then its few-step students.

    With --model, distill another Wan pipeline; the students go into its folder, or into --out for a hub id.
    """
    parts = ("vae", "base", "gpd", "meanflow", "predictor", "all")
    if what not in parts:
        raise AccelError(f"unknown part {what!r}; there are {', '.join(parts)}")
    from .training.parts import export_base, shutdown_distributed, train_parts

    if export:
        return print_json(export_base(what, setting, out))
    given = dict(model=model, prompts=prompts, rank=rank, videos=videos, trajectories=trajectories, ablation=ablation)
    print_json(train_parts(what, minutes, resume, out, setting, **given))
    shutdown_distributed()


@world.command()
def sample(
    n: Annotated[int, typer.Option(min=1, help="Scenes.")] = 16, seed: Seed = 0,
    size: Annotated[int, typer.Option(min=1, help="Height and width in pixels.")] = 96,
    frames: Annotated[int, typer.Option(min=1, help="Frames of each scene.")] = 33,
    held_out: Annotated[bool, typer.Option(help="Only combinations that are held out of training.")] = False,
    out: Out = Path("runs/world"),
) -> None:  # fmt: skip
    """Render captioned scenes: mp4s, captions.json and a contact sheet in --out, in place of earlier ones."""
    import random
    import re

    import imageio.v3 as iio
    import numpy as np

    from .runtime.video import write_mp4
    from .world.render import render
    from .world.scene import caption, sample_scene

    rng, captions, rows = random.Random(seed), {}, []
    before = [file.name for file in out.glob("*.mp4") if re.fullmatch(r"\d{3,}", file.stem)]
    with all_or_nothing(out, "captions.json", (*before, "sheet.png", "captions.json")) as part:
        for i in tqdm(range(n), desc="scenes"):
            scene = sample_scene(rng, held_out)
            text, video = caption(scene, rng), render(scene, frames, size).numpy()
            captions[f"{i:03d}.mp4"] = text
            write_mp4(part / f"{i:03d}.mp4", video, 12, {"caption": text})
            rows.append(np.concatenate(list(video[:: max(1, frames // 8)]), 1))
        iio.imwrite(part / "sheet.png", np.concatenate(rows))
        write_json(part / "captions.json", captions)
    print_json({"n": n, "size": size, "frames": frames, "out": str(out)})


@world.command()
def judge(
    folder: Annotated[Path, typer.Argument(help="Folder of mp4s with captions.json, as `sample` makes it.")],
) -> None:
    """Score the videos of a folder against their captions."""
    from .world.captions import read_captions

    captions = read_captions(folder)
    import numpy as np

    from .runtime.video import read_mp4
    from .world.judge import score

    scores = {name: score(read_mp4(folder / name, JUDGED_WIDTH), text) for name, text in captions.items()}
    for name, values in scores.items():
        attributes = " ".join(f"{a} {v:.0f}" for a, v in values.items() if a != "mean")
        print(name, attributes, f"mean {values.get('mean', 0):.2f}")
    names = sorted({attribute for values in scores.values() for attribute in values})
    means = {a: float(np.mean([values[a] for values in scores.values() if a in values])) for a in names}
    print_json({"n": len(scores), **means})
