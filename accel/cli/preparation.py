"""Commands that prepare a model for methods: profile, calibrate, fit and train."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..files import only_writer
from ..runtime.models import TINY
from .options import INTERRUPTED, Guidance, Model, Out, Seed, Steps, first_example, print_json


def profile(
    model: Model = TINY,
    prompts: Annotated[int, typer.Option(min=1, help="Prompts that costs are averaged over.")] = 4,
    steps: Steps = None,
    out: Annotated[Path, typer.Option(help="Folder for the tables and the plot.")] = Path("runs/profile"),
) -> None:  # fmt: skip
    """Measure what removing tokens costs in each block: asymrnr.json for AsymRnR, a table and a plot. Resumable."""
    from ..runtime.models import check_model

    check_model(model)
    from ..evaluation.asymrnr_profile import run_profile

    with only_writer(out):
        print_json(run_profile(model, prompts, steps, out))


def calibrate(
    model: Model = TINY,
    prompt: Annotated[str, typer.Option(help="What to generate; default: the first example of the model.")] = None,
    seed: Seed = 0,
    steps: Steps = None,
    out: Out = Path("runs/calibrate"),
) -> None:
    """Measure in one run the ratios that diffusers' MagCache needs: magcache.json, also in the folder of the model."""
    from ..runtime.models import check_model

    check_model(model)
    from ..evaluation.magcache_ratios import run_calibration

    prompt = prompt or first_example(model)
    with only_writer(out):
        print_json(run_calibration(model, prompt, seed, steps, out))


def fit(
    steps: Annotated[list[int], typer.Argument(min=1, help="Step counts of 4-8, 10, 12, 14, 16, 20, 25, 33.")],
    model: Model = TINY,
    prompts: Annotated[int, typer.Option(min=1, help="Prompts whose baselines the solvers are fitted to.")] = 8,
    uncond_share: Annotated[
        float, typer.Option(min=0.05, max=1, help="Share of the steps that run the unconditional branch.")
    ] = 1.0,
    guidance: Guidance = None,
    tries: Annotated[
        int, typer.Option(min=0, help="Lists of steps to try after five spacings; each takes half a spacing's time.")
    ] = 40,
    out: Out = Path("runs/fit"),
) -> None:  # fmt: skip
    """Fit solvers of few steps to the model's own trajectories: a JSON file each, also in the folder of the model.

    No training: for each step a least-squares problem. With 40 tries, a solver takes as long as some ten baselines of
    each prompt.
    """
    from ..runtime.models import check_model

    check_model(model)
    from ..evaluation.solver_fit import run_fit

    with only_writer(out):
        print_json(run_fit(model, steps, uncond_share, guidance, prompts, tries, out))


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
    from ..training.settings import check_part

    check_part(what)
    from ..training.parts import export_base, shutdown_distributed, train_parts

    if export:
        return print_json(export_base(what, setting, out))
    given = dict(model=model, prompts=prompts, rank=rank, videos=videos, trajectories=trajectories, ablation=ablation)
    record = train_parts(what, minutes, resume, out, setting, **given)
    stopped = record.pop("stopped", False)
    print_json(record)
    shutdown_distributed()
    if stopped:
        raise typer.Exit(INTERRUPTED)  # so that "train meanflow && train predictor" ends here
