"""Commands that measure settings: bench, sweep, tune, gpu, and the documents made from their results."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import AccelError
from ..files import only_writer, read_utf8
from ..runtime.models import TINY
from ..runtime.presets import RUN_SETTINGS
from .options import (
    Frames,
    Guidance,
    Model,
    Out,
    PresetName,
    Seed,
    Sets,
    Shift,
    Size,
    SolverName,
    Steps,
    first_example,
    load_for,
    parse_settings,
    print_json,
)


def bench(
    suite: Annotated[str, typer.Option(help="Such as front, base, steps, peers; a wrong name lists all.")] = "base",
    prompts: Annotated[int, typer.Option(min=1, help="Held-out prompts of the toy world, for any model.")] = 64,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds for each prompt.")] = 1,
    model: Model = TINY,
    out: Annotated[Path, typer.Option(help="Folder for the results; default: runs/bench/SUITE.")] = None,
) -> None:  # fmt: skip
    """Measure a suite on held-out prompts: results.json, report.md and pareto.png in --out. Resumable.

    Processes share the work: torchrun --nproc_per_node 2 -m accel bench ...
    """
    from ..evaluation.suites import check_suite
    from ..runtime.models import check_model

    check_suite(suite)
    check_model(model)
    from accelerate import PartialState

    from ..evaluation.bench import run_suite

    if summary := run_suite(suite, prompts, seeds, model, out or Path("runs/bench") / suite):
        print_json(summary)
    PartialState().destroy_process_group()


def tune(
    max_loss: Annotated[
        float,
        typer.Option(min=0, max=1, help="Write one preset: the fastest that loses no more SSIM, and hardly adherence."),
    ] = None,
    front: Annotated[bool, typer.Option("--front", help="Write a preset for each speed; the default.")] = False,
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
    if front and max_loss is not None:
        raise AccelError("--front and --max-loss do not go together: a preset for each speed, or one for a loss")
    if prompt_file and prompts:
        raise AccelError("--prompt-file and --prompts do not go together: the file says which prompts there are")
    texts = read_prompts(prompt_file, model) if prompt_file else []
    pipe, defaults, _ = load_for(model, lambda defaults: [])
    from ..evaluation import tune as search
    from ..evaluation.front import CLASSES
    from ..evaluation.suites import TUNING_SEED
    from ..world.scene import held_out_prompts

    texts = texts or held_out_prompts(prompts or 4, TUNING_SEED)  # no report uses these
    with only_writer(out):
        tries = search.tune(model, pipe, defaults, texts, trials, seed, out)
        rows = search.front(tries)
        chosen = {f"front-{speed:g}x": search.at_least(rows, speed) for speed in CLASSES}
        if max_loss is not None:
            chosen = {f"loss-{max_loss:g}": search.fastest(tries, max_loss)}
        chosen = {name: row for name, row in chosen.items() if row}
        for name, row in chosen.items():
            search.write_preset(row, out / f"{name}.yaml", len(texts), trials)
    print(search.front_table(chosen))
    print_json({"out": str(out), "presets": {name: str(out / f"{name}.yaml") for name in chosen}, "rows": rows})


def read_prompts(file: Path, model: str) -> list[str]:
    """The prompts of a text file, one a line. Raises AccelError if there are none, or if one is not allowed."""
    from ..runtime.models import ModelDefaults
    from ..runtime.run import build_run

    lines = [line.strip() for line in read_utf8(file).split("\n") if line.strip()]
    if not lines:
        raise AccelError(f"{file} has no prompt: write one a line")
    for line in lines:
        build_run(ModelDefaults(), model=model, prompt=line)
    return lines


def sweep(
    axis: Annotated[list[str], typer.Option(help="steps=20,30,50 or gpd.steps=6..16; once or twice.")],
    prompt: Annotated[str, typer.Option(help="What to generate; default: the first example of the model.")] = None,
    seed: Seed = 0, preset: PresetName = None, set_: Sets = None,
    steps: Steps = None, guidance: Guidance = None, solver: SolverName = None, shift: Shift = None, model: Model = TINY,
    height: Size = None, width: Size = None, frames: Frames = None,
    plain_steps: Annotated[str, typer.Option(help="Also measure the baseline in these steps: 10,20,30.")] = "",
    out: Out = Path("runs/sweep"),
) -> None:  # fmt: skip
    """Measure the values of one or two axes against one baseline: results.json, pareto.png, folders. Resumable."""
    from ..evaluation.sweep import check_available, expand, parse_axis_option, parse_steps
    from ..runtime.run import build_run

    prompt = prompt or first_example(model)
    common = dict(model=model, prompt=prompt, height=height, width=width, frames=frames)
    reference = {"seed": seed, **dict(zip(RUN_SETTINGS, (steps, guidance, solver, shift)))}
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
    from ..evaluation.sweep_run import run_sweep, sweep_table

    with only_writer(out):
        results = run_sweep(list(zip(cells, runs[::2], runs[1::2])), pipe, defaults, out)
    print(sweep_table(results["rows"]))
    print_json({**results, "out": str(out)})


def gpu(
    layout: Annotated[str, typer.Option(help="Only this one of ltx, cogvideox-2b and wan-1.3b.")] = None,
    steps: Annotated[int, typer.Option(min=10, help="Denoising steps; in fewer, methods do not act.")] = 10,
    repeats: Annotated[int, typer.Option(min=1, help="Times that all settings are generated in turn.")] = 1,
    small: Annotated[bool, typer.Option("--small", help="Tiny models, to try the command on a CPU.")] = False,
    out: Out = Path("runs/gpu"),
) -> None:  # fmt: skip
    """Time the methods on random weights in real models' sizes, with plain and compiled blocks, on a GPU."""
    from ..evaluation.gpu import run_gpu

    with only_writer(out):
        print_json(run_gpu(layout, steps, repeats, small, out))


def docs() -> None:
    """Fill the generated tables of README.md, docs/ and the model card."""
    from ..evaluation.docs import write

    print_json({"changed": [str(page) for page in write()]})
