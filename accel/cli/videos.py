"""Commands that generate videos: run, compare, and the report of a pair."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from tqdm import tqdm

from ..errors import AccelError
from ..files import all_or_nothing, write_json
from ..runtime.models import TINY
from .options import (
    Frames,
    Guidance,
    Model,
    Out,
    PresetName,
    Prompt,
    Seed,
    Sets,
    Shift,
    Size,
    SolverName,
    Steps,
    load_for,
    pair_maker,
    parse_settings,
    print_json,
    print_messages,
)

# What run, compare and report leave in a folder; new results remove it.
RESULT_FILES = tuple("video.mp4 frames.npy a.mp4 b.mp4 a.npy b.npy a.jpg b.jpg run.json report.zip".split())


def run(
    context: typer.Context,
    prompt: Prompt = None, seed: Seed = 0, preset: PresetName = None, set_: Sets = None,
    steps: Steps = None, guidance: Guidance = None, solver: SolverName = None, shift: Shift = None, model: Model = TINY,
    height: Size = None, width: Size = None, frames: Frames = None,
    source: Annotated[Path, typer.Option("--from", help="Repeat the run stored in a video made here.")] = None,
    out: Out = Path("runs/run"),
) -> None:  # fmt: skip
    """Generate one video with a preset: video.mp4, frames.npy and run.json in --out, all of them or none."""
    from ..runtime.run import build_run

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

    from ..runtime.generate import environment, generate, preflight, warm_up
    from ..runtime.video import write_mp4

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
    from ..runtime.video import read_settings

    stored = read_settings(source)
    if "model" not in stored:
        raise AccelError(f"{source} was not made by `accel run` or `compare`: it holds no run to repeat")
    return stored


def compare(
    prompt: Prompt, seed: Seed = 0, preset: PresetName = None, set_: Sets = None,
    steps: Steps = None, guidance: Guidance = None, solver: SolverName = None, shift: Shift = None, model: Model = TINY,
    height: Size = None, width: Size = None, frames: Frames = None,
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

    from ..evaluation.compare import compare as compare_runs
    from ..runtime.generate import preflight
    from ..runtime.video import write_mp4

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
    from ..evaluation.metrics import metric_texts

    r, (low, high) = report, report["speedup_range"]
    quality = "; ".join(f"{value} {about}" for value, about in metric_texts(r))
    return (
        f"denoise {r['speedup_denoise']:.2f}x [{low:.2f}, {high:.2f}], total {r['speedup_total']:.2f}x, "
        f"work {r['work_ratio']:.0%}, efficiency {r['efficiency']:.2f}; {quality}\n"
        f"n={repeats}, {r['device']}, {r['threads']} threads, {r['dtype']}; "
        f"slowest over fastest baseline: {r['baseline_jitter']:.2f}"
    )


def report(
    folder: Annotated[Path, typer.Argument(help="Folder that `compare` wrote.")],
    out: Annotated[Path, typer.Option(help="The zip; default: report.zip in the folder.")] = None,
) -> None:
    """Make a zip of a pair that opens without a network: the videos, one with both, figures, settings, a page."""
    from ..evaluation.pair_report import write_report

    out = out or folder / "report.zip"
    out.parent.mkdir(parents=True, exist_ok=True)
    write_report(folder, out)
    print_json({"out": str(out), "bytes": out.stat().st_size})
