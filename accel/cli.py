"""The command line. People read the progress on stderr and the lines on stdout; its last line is one JSON document."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
import yaml
from tqdm import tqdm
from typer.exceptions import TyperException

from .models import TINY

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None, help=__doc__)
world = typer.Typer(no_args_is_help=True, help="The captioned toy world: sample it, judge videos.")
app.add_typer(world, name="world")

Prompt = Annotated[
    str, typer.Option(help="What to generate; the shipped model knows sentences like examples/prompts.txt.")
]
Seed = Annotated[int, typer.Option(help="Starting noise; the same seed gives the same video.")]
PresetName = Annotated[str, typer.Option("--preset", help="A name in presets/ or a YAML file; 'none' for no method.")]
Sets = Annotated[list[str], typer.Option("--set", help="Change a knob: fastercache.attention_interval=3. Repeatable.")]
Steps = Annotated[int, typer.Option(help="Denoising steps; the model's own if not given.")]
Guidance = Annotated[float, typer.Option(help="Guidance scale; the model's own if not given.")]
Model = Annotated[str, typer.Option(help="Folder or Hugging Face id of a diffusers pipeline.")]
Size = Annotated[int, typer.Option(min=1, help="Pixels or frames; the model's own if not given.")]
Out = Annotated[Path, typer.Option(help="Folder for the results; made if missing.")]


def main() -> None:
    """Run a command; bad input ends with one line on stderr and exit code 2."""
    try:
        code = app(standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except TyperException as error:  # the command line itself; without arguments it is the help
        text = error.format_message()
        print(text if "Usage:" in text else f"error: {text}", file=sys.stderr)
        sys.exit(2)
    except (ValueError, FileNotFoundError, FileExistsError, NotADirectoryError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except (OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


def _finish(document: dict) -> None:
    print(json.dumps(document))


def _settings(preset: str, sets: list[str]) -> dict:
    """Methods, steps and guidance of a preset with `--set` changes applied."""
    from .presets import load_preset

    loaded = load_preset(preset) if preset != "none" else None
    methods = {name: dict(knobs or {}) for name, knobs in (loaded.methods if loaded else {}).items()}
    for change in sets or []:
        target, _, value = change.partition("=")
        name, _, knob = target.partition(".")
        if not (knob and value):
            raise ValueError(f"--set {change!r} is not understood: write method.knob=value")
        try:
            methods.setdefault(name, {})[knob] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise ValueError(f"--set {change!r} is not understood: put the value into quotes") from None
    return {"methods": methods, "steps": loaded and loaded.steps, "guidance": loaded and loaded.guidance}


def _pair(prompt, seed, preset, sets, steps, guidance, model, height, width, frames, *, apart: bool):
    """Pipeline, its home, and the runs a (plain) and b (with the preset).

    `apart`: steps and guidance are a's alone where the methods of b demand their own.
    """
    from .models import home_of, load_pipeline
    from .presets import demanded
    from .run import build_run, check_size

    own = _settings(preset, sets)
    needed = demanded(own["methods"]) if apart else {}
    pipe = load_pipeline(model)
    home = home_of(pipe, model)
    common = dict(model=model, prompt=prompt, seed=seed, height=height, width=width, frames=frames)
    a = build_run(home, **common, steps=steps, guidance=guidance)
    given = {"steps": steps, "guidance": guidance}
    asked = {key: own[key] if value is None else value for key, value in given.items() if key not in needed}
    b = build_run(home, **common, methods=own["methods"], **asked)
    check_size(pipe, b)
    return pipe, home, a, b


def _repeated(source: Path):
    """Pipeline, its home, and the run whose settings a video holds."""
    from .models import home_of, load_pipeline
    from .run import build_run, check_size
    from .video import read_settings

    stored = read_settings(source)
    if "model" not in stored:
        raise ValueError(f"{source} was not made by `accel run` or `compare`: it holds no run to repeat")
    pipe = load_pipeline(stored["model"])
    home = home_of(pipe, stored["model"])
    b = build_run(home, **stored)
    check_size(pipe, b)
    return pipe, home, b


@app.command()
def run(
    context: typer.Context,
    prompt: Prompt = None, seed: Seed = 0, preset: PresetName = "fastercache", set_: Sets = None,
    steps: Steps = None, guidance: Guidance = None, model: Model = TINY,
    height: Size = None, width: Size = None, frames: Size = None,
    source: Annotated[Path, typer.Option("--from", help="Repeat the settings inside a video made here.")] = None,
    out: Out = Path("runs/run"),
) -> None:  # fmt: skip
    """Generate one video with a preset: video.mp4, frames.npy and run.json in --out."""
    from .run import generate, machine, outlook, warm_up
    from .video import write_mp4

    if source is not None:
        told = [name for name in context.params if context.get_parameter_source(name).name == "COMMANDLINE"]
        if more := [name.rstrip("_") for name in told if name not in ("source", "out")]:
            raise ValueError(f"--from repeats a video as it was made: leave --{', --'.join(more)} out")
        if source.resolve() == (out / "video.mp4").resolve():
            raise ValueError(f"{source} would be replaced by what is made from it: give another --out")
        pipe, home, b = _repeated(source)
    elif prompt is None:
        raise ValueError("give a --prompt, or a video to repeat with --from")
    else:
        pipe, home, _, b = _pair(prompt, seed, preset, set_, steps, guidance, model, height, width, frames, apart=False)
    out.mkdir(parents=True, exist_ok=True)
    print("\n".join(told := outlook(b, pipe)))
    warm_up(b, pipe, home)
    with tqdm(total=b.steps, desc="denoising") as bar:
        video = generate(b, pipe, home, lambda *_: bar.update())
    video.seconds["encode"] = write_mp4(out / "video.mp4", video.frames, home.fps, b.model_dump())
    np.save(out / "frames.npy", video.frames)
    document = {**b.model_dump(), **machine(pipe), "seconds": video.seconds, "trace": video.trace.to_json()}
    (out / "run.json").write_text(json.dumps(document, indent=1))
    for note in video.trace.notes:
        if note not in told:
            print(note)
    print(f"{video.seconds['denoise']:.2f} s of denoising, {video.trace.summary()['work']:.0%} of the work -> {out}")
    _finish({**b.model_dump(), "seconds": video.seconds, "work": video.trace.summary()["work"], "out": str(out)})


@app.command()
def compare(
    prompt: Prompt, seed: Seed = 0, preset: PresetName = "fastercache", set_: Sets = None,
    steps: Steps = None, guidance: Guidance = None, model: Model = TINY,
    height: Size = None, width: Size = None, frames: Size = None,
    repeats: Annotated[int, typer.Option(min=1, max=100, help="Times that a and b are generated in turn.")] = 3,
    out: Out = Path("runs/compare"),
) -> None:  # fmt: skip
    """Generate a (plain) and b (with the preset) from the same noise: a.mp4 b.mp4 a.npy b.npy run.json in --out."""
    from .run import compare as compare_runs
    from .run import outlook
    from .video import write_mp4

    pipe, home, a, b = _pair(prompt, seed, preset, set_, steps, guidance, model, height, width, frames, apart=True)
    out.mkdir(parents=True, exist_ok=True)
    runs = {"a": a, "b": b}

    def write(pane: str, video) -> None:
        video.seconds["encode"] = write_mp4(out / f"{pane}.mp4", video.frames, home.fps, runs[pane].model_dump())
        np.save(out / f"{pane}.npy", video.frames)

    print("\n".join(told := outlook(b, pipe)))
    with tqdm(total=repeats * (a.steps + b.steps), desc="a and b in turn") as bar:
        pair = compare_runs(a, b, pipe, home, repeats, lambda *_: bar.update(), write)
    (out / "run.json").write_text(json.dumps(pair.report, indent=1))
    r = pair.report
    likeness = (
        "bit-equal"
        if r["bit_equal"]
        else f"PSNR {r['psnr']:.1f} dB, SSIM {r['ssim']:.4f} (worst {r['ssim_worst']:.4f})"
    )
    low, high = r["speedup_range"]
    print(f"denoise {r['speedup_denoise']:.2f}x [{low:.2f}, {high:.2f}], total {r['speedup_total']:.2f}x, "
          f"work {r['work_ratio']:.0%}, efficiency {r['efficiency']:.2f}; {likeness}")  # fmt: skip
    print(f"n={repeats}, {r['device']}, {r['threads']} threads, {r['dtype']}; a against a: {r['noise_a']:.2f}x")
    for note in pair.b.trace.notes:
        if note not in told:
            print(note)
    _finish(r)


@app.command()
def bench(
    suite: Annotated[str, typer.Option(help="base, fastercache, asymrnr, gpd, meanflow, disca or a part.")] = "base",
    prompts: Annotated[int, typer.Option(min=1, help="Held-out prompts.")] = 64,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds a prompt.")] = 1,
    model: Model = TINY,
    out: Annotated[Path, typer.Option(help="Folder for the results; runs/bench/SUITE if not given.")] = None,
) -> None:  # fmt: skip
    """Measure a suite on held-out prompts: results.json, report.md and pareto.png in --out. Resumable."""
    from .bench import run_suite

    _finish(run_suite(suite, prompts, seeds, model, out or Path("runs/bench") / suite))


@app.command()
def profile(
    model: Model = TINY,
    prompts: Annotated[int, typer.Option(min=1, help="Prompts that costs are averaged over.")] = 4,
    steps: Steps = None,
    out: Annotated[Path, typer.Option(help="Folder for the tables and the plot.")] = Path("runs/profile"),
) -> None:  # fmt: skip
    """Measure what removing tokens costs in each block: asymrnr.json for AsymRnR, a table and a plot. Resumable."""
    from .profile import run_profile

    _finish(run_profile(model, prompts, steps, out))


@app.command()
def train(
    what: Annotated[str, typer.Argument(help="vae, base, gpd, meanflow, predictor or all.")],
    minutes: Annotated[float, typer.Option(help="Stop after this many minutes; a later --resume goes on.")] = None,
    resume: Annotated[bool, typer.Option(help="Go on from the last checkpoint, or from the shipped weights.")] = False,
    out: Out = Path("checkpoints"),
    setting: Annotated[str, typer.Option(help="small, medium (the living world, 96x96) or large. [by device]")] = None,
    export: Annotated[bool, typer.Option(help="Only write the averaged weights of the base's checkpoint.")] = False,
    model: Annotated[str, typer.Option(help="Of a student: another model to distil, by LoRA.")] = None,
    prompts: Annotated[Path, typer.Option(help="With --model: a text file of prompts, one a line.")] = None,
    rank: Annotated[int, typer.Option(min=0, help="With --model: rank of the LoRA, or 0: full weights. [64]")] = None,
    videos: Annotated[Path, typer.Option(help="meanflow alone: a folder of videos with captions.json.")] = None,
    slots: Annotated[int, typer.Option(min=1, help="With --model: trajectories under way, over all processes.")] = None,
    arm: Annotated[
        str,
        typer.Option(
            help="A rival. gpd: no-constraint, annealed, halving, direct, guidance-only; meanflow: even, exact, "
            "unrestricted, guided; predictor: plain."
        ),
    ] = None,
) -> None:
    """Train the shipped model: the autoencoder, the transformer with its text encoder, then its few-step students.

    With --model, distil another Wan pipeline; its students go beside it, or into --out for a hub id.
    """
    from .training import export_base, part_ways, train_parts

    given = dict(model=model, prompts=prompts, rank=rank, videos=videos, slots=slots, arm=arm)
    _finish(
        export_base(setting or "small", out) if export else train_parts(what, minutes, resume, out, setting, **given)
    )
    part_ways()


@world.command()
def sample(
    n: Annotated[int, typer.Option(min=1)] = 16, seed: Seed = 0, size: Size = 96, frames: Size = 33,
    held_out: Annotated[bool, typer.Option(help="Only combinations that training never sees.")] = False,
    living: Annotated[bool, typer.Option(help="Living textures, shadows, second objects.")] = False,
    out: Out = Path("runs/world"),
) -> None:  # fmt: skip
    """Render n captioned scenes: mp4s, captions.json and a contact sheet."""
    import imageio.v3 as iio

    from .video import write_mp4
    from .world.render import render
    from .world.scene import caption, sample_scene

    out.mkdir(parents=True, exist_ok=True)
    rng, captions, rows = random.Random(seed), {}, []
    for i in range(n):
        scene = sample_scene(rng, held_out, living)
        text, video = caption(scene, rng), render(scene, frames, size).numpy()
        captions[f"{i:03d}.mp4"] = text
        write_mp4(out / f"{i:03d}.mp4", video, 12, {"caption": text})
        rows.append(np.concatenate(list(video[:: max(1, frames // 8)]), 1))
    (out / "captions.json").write_text(json.dumps(captions, indent=1))
    iio.imwrite(out / "sheet.png", np.concatenate(rows))
    _finish({"n": n, "size": size, "frames": frames, "out": str(out)})


@world.command()
def judge(
    folder: Annotated[Path, typer.Argument(help="Folder of mp4s with captions.json, as `sample` makes it.")],
) -> None:
    """Read the videos of a folder back and score them against their captions."""
    import imageio.v3 as iio

    from .world.judge import score

    file = folder / "captions.json"
    if not file.is_file():
        raise ValueError(f"{file} is missing: it maps each mp4 of the folder to its caption")
    captions = json.loads(file.read_text())
    if not isinstance(captions, dict) or (lost := [name for name in captions if not (folder / name).is_file()]):
        what = "it is no table" if not isinstance(captions, dict) else f"{lost[0]} is missing"
        raise ValueError(f"{file} does not map each mp4 of its folder to a caption: {what}")
    marks = {name: score(np.stack(list(iio.imiter(folder / name))), text) for name, text in captions.items()}
    for name, mark in marks.items():
        print(name, " ".join(f"{a} {v:.0f}" for a, v in mark.items() if a != "mean"), f"mean {mark.get('mean', 0):.2f}")
    names = sorted({a for mark in marks.values() for a in mark})
    _finish({"n": len(marks), **{a: float(np.mean([m[a] for m in marks.values() if a in m])) for a in names}})
