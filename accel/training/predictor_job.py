"""DisCa's predictor as it is ordered: of which student, in which form; where it goes."""

from __future__ import annotations

import json
import sys
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import get_args

import torch
from accelerate import PartialState
from safetensors.torch import load_file

from ..families import family_of
from ..methods.disca.disca import select_full_steps
from ..methods.disca.predictor import Predictor, PredictorForm
from ..runtime.generate import build_run, grid
from ..runtime.models import model_defaults
from ..students.interval_embedding import INTERVAL_EMBEDDER, with_interval_embedder
from ..students.loading import check_base, load_student
from ..students.weights import fingerprint
from .feature_probe import FeatureProbe
from .jobs import DistillJob, prepare_dir, rank_and_world
from .optim import OptimConfig
from .optimize import optimize_blocks
from .rollouts import MeanFlowContext
from .stages import distil, remaining, store, totals
from .tasks.predictor_fit import PredictorConfig, PredictorTask
from .validation import CachedRolloutValidator

ABLATIONS = get_args(PredictorForm)
DEPTH = 1  # blocks: one is an eighth of the shipped model, two would be a quarter; the paper's two are under 4 %
SHARPEN = 3  # how many times fewer iterations the second stage has, at half the rates
FULL = 8  # whole passes, of the steps, that it is looked at with


def train_predictor(
    optim: OptimConfig, job: DistillJob, device: str, minutes: float | None, resume: bool, out: Path
) -> dict:
    """Train a predictor for the MeanFlow student beside a model; it lies there too, in `predictor/` by its form.

    Raises ValueError for an order that cannot be carried out, or a resume of another order.
    """
    began, lines = time.monotonic(), job.lines(ABLATIONS)
    if job.rank is not None:
        raise ValueError("a predictor is small and learns whole: leave --rank out")
    pipe, form = job.pipeline(device), job.ablation or ABLATIONS[0]
    folder = (job.beside() or job.other_job_dir(out, "meanflow")) / "meanflow"
    if not (folder / "meanflow.json").is_file():
        raise ValueError("the student comes first: python -m accel train meanflow")
    facts = json.loads((folder / "meanflow.json").read_text())
    check_base(folder, facts["base_fingerprint"], pipe)
    with ExitStack() as stack:
        stack.enter_context(load_student(folder, pipe.transformer))
        stack.enter_context(with_interval_embedder(pipe.transformer, load_file(folder / INTERVAL_EMBEDDER)))
        student = fingerprint(pipe.transformer)
        stack.callback(setattr, pipe.transformer, "blocks", pipe.transformer.blocks)
        task = _task(optim, job, pipe, facts, lines, form, device)
        optims = stage_recipes(optim)
        told = {
            "student_fingerprint": student,
            "config": task.config.model_dump(mode="json"),
            "form": form,
            **job.told(lines),
        }
        prepare_dir(out, resume, optims, told)
        target = (job.beside() or out) / "predictor" / form
        print(f"the predictor goes into {target}", file=sys.stderr)
        held = CachedRolloutValidator(task, job.looks(lines), select_full_steps(FULL, task.config.steps))
        keep = partial(_save_stage, task, {"form": form, "depth": DEPTH, "student_fingerprint": student}, out, target)
        return totals(optims, distil(task, held, optims, out, keep, remaining(minutes, began), resume))


def _task(
    optim: OptimConfig, job: DistillJob, pipe, facts: dict, lines: list[str], form: str, device: str
) -> PredictorTask:
    defaults = model_defaults(pipe, job.model)
    config = PredictorConfig(guidance=facts["guidance"], trajectories=job.num_trajectories())
    context = MeanFlowContext(
        **vars(job.context(pipe, defaults, config.steps, lines)), guidance=facts["teacher_guidance"]
    )
    tokens, family = grid(pipe, build_run(defaults, model="", prompt="-")), family_of(pipe)
    torch.manual_seed(optim.seed)
    predictor = Predictor(family, pipe.transformer, form, DEPTH)
    if job.is_toy():
        for blocks in (pipe.transformer.blocks, predictor.blocks):
            optimize_blocks(blocks, device)
    student = FeatureProbe(pipe.transformer, spare=not job.is_toy())
    return PredictorTask(optim, config, student, predictor, context, tokens, rank_and_world())


def stage_recipes(optim: OptimConfig) -> list[OptimConfig]:
    """A recipe for each stage."""
    fine = {"steps": max(1, optim.steps // SHARPEN), "lr": optim.lr / 2, "matrix_lr": optim.matrix_lr / 2}
    return [optim, optim.model_copy(update=fine)]


def _save_stage(task: PredictorTask, told: dict, out: Path, target: Path, facts: dict) -> None:
    """Store the predictor after a stage: the last one as the result, the first one for comparison."""
    if not PartialState().is_main_process:
        return
    target = target if task.stage else out / "match-only"
    name, before = list(task.stages)[task.stage], out / "regression" / "done.json"
    stages = {"regression": json.loads(before.read_text())} if task.stage else {}
    about = told | {"stages": {**stages, name: facts}, "config": task.config.model_dump()}
    store(task, target, "predictor.json", about | {"optim": task.optim.model_dump()})
