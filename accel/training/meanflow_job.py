"""Restricted MeanFlow as it is ordered: guidance first, then mean velocities; where the student goes."""

from __future__ import annotations

import json
import sys
import time
from functools import partial
from pathlib import Path

import torch
from accelerate import PartialState
from torch import nn

from ..runtime.models import model_defaults
from ..students.interval_embedding import IntervalEmbedder, unwrapped
from ..students.weights import fingerprint, load_int8_delta, matches_fingerprint
from .jobs import DistillJob, prepare_dir, rank_and_world, share_stages
from .optim import OptimConfig
from .rollouts import MeanFlowContext
from .stages import distil, remaining, store, totals
from .tasks.meanflow_distillation import MeanFlowConfig, MeanFlowTask, max_step_width

FIRST = 2  # times the second stage's iterations in the first, at twice the rates: its error is the floor of all
ABLATIONS: dict[str, dict] = {  # the method, and plain MeanFlow; R is the widest interval of the schedules if not given
    "meanflow": {},
    "even": {"limit_to_schedule": False},
    "exact": {"jvp": "exact"},
    "unrestricted": {"max_interval": 1.0, "limit_to_schedule": False},
    "guided": {"source": "base"},  # so that the second stage goes on with what the first has not taken in
}
SECOND = ("max_interval", "limit_to_schedule", "jvp", "source")  # what of a course its second stage alone heeds
STEPS = (20, 10)  # numbers of steps that the student is made for
HEAD_START = "gpd-N48"  # a student that took in guidance at one strength, if it is there


def train_meanflow(
    optim: OptimConfig, job: DistillJob, device: str, minutes: float | None, resume: bool, out: Path
) -> dict:
    """Distil a model into a student that lies beside it, `meanflow`; a rival's lies in `out`.

    Raises ValueError for an order that cannot be carried out, or a resume of another order.
    """
    began, lines = time.monotonic(), job.lines(ABLATIONS)
    pipe = job.pipeline(device)
    base = fingerprint(pipe.transformer)
    task, start = _task(optim, job, pipe, lines, device)
    optims = stage_recipes(optim)
    told = {
        "base_fingerprint": base,
        "config": task.config.model_dump(mode="json"),
        "init_from": start,
        **job.told(lines),
    }
    prepare_dir(out, resume, optims, told)
    own = job.ablation in (None, "meanflow")
    if not own:
        resume |= share_stages(job.other_job_dir(out, "meanflow"), out, list(task.stages), _stage_config)
    target = job.beside() if own and job.beside() else out
    print(
        f"intervals up to R = {task.config.max_interval:.3f}; the student goes into {target / 'meanflow'}",
        file=sys.stderr,
    )
    held, keep = (
        job.held_out(task, pipe, lines),
        partial(_save_stage, task, {"base_fingerprint": base, "init_from": start}, out, target),
    )
    return {
        "init_from": start,
        **totals(optims, distil(task, held, optims, out, keep, remaining(minutes, began), resume)),
    }


def _task(optim: OptimConfig, job: DistillJob, pipe, lines: list[str], device: str) -> tuple[MeanFlowTask, str | None]:
    """The task, and the student whose weights it starts with."""
    defaults = model_defaults(pipe, job.model)
    around = (max(1.0, 0.5 * defaults.guidance), 1.25 * defaults.guidance)
    given = {"max_interval": max_step_width(pipe.scheduler, STEPS), "steps": STEPS, "guidance": around}
    config = MeanFlowConfig(**given | {"trajectories": job.num_trajectories()} | ABLATIONS[job.ablation or "meanflow"])
    context = MeanFlowContext(**vars(job.context(pipe, defaults, config.base_steps, lines)), guidance=defaults.guidance)
    transformer, beside = pipe.transformer, job.beside()
    start = HEAD_START if not job.adapters() and beside and has_head_start(beside, transformer) else None
    transformer.condition_embedder = IntervalEmbedder(transformer.condition_embedder)
    nets = job.networks(transformer, optim.seed, device)
    if start:
        start_from(nets.module, transformer, beside / HEAD_START)
    return MeanFlowTask(optim, config, nets, context, rank_and_world()), start


def has_head_start(beside: Path, transformer: nn.Module) -> bool:
    """Whether a student that took in guidance lies beside a model, and is of that model and not of an earlier one."""
    folder = beside / HEAD_START
    if not (folder / "model.safetensors").is_file():
        return False
    if matches_fingerprint(transformer, json.loads((folder / "gpd.json").read_text())["base_fingerprint"]):
        return True
    print(f"{folder} was made from another base: the first stage begins with this one", file=sys.stderr)
    return False


@torch.no_grad()
def start_from(module: nn.Module, base: nn.Module, folder: Path) -> None:
    """Give a student the weights of another one of its base; those that are zero in the base's time embedding stay."""
    with unwrapped(module), unwrapped(base):
        known = load_int8_delta(base, folder / "model.safetensors")
        for (name, own), plain in zip(module.named_parameters(), base.parameters(), strict=True):
            own.copy_(known[name] * (plain != 0) if "time_embedder" in name else known[name])


def _stage_config(job: dict, stage: int) -> dict:
    """What of an order tells on a stage and on those before it."""
    config = {knob: value for knob, value in job["config"].items() if stage or knob not in SECOND}
    return {**job, "config": config, "optims": job["optims"][: stage + 1]}


def stage_recipes(optim: OptimConfig) -> list[OptimConfig]:
    """A recipe for each stage."""
    fast = {"steps": FIRST * optim.steps, "lr": 2 * optim.lr, "matrix_lr": 2 * optim.matrix_lr}
    return [optim.model_copy(update=fast), optim]


def _save_stage(task: MeanFlowTask, told: dict, out: Path, target: Path, facts: dict) -> None:
    """Store a stage's student: the last one as the result, the first one for comparison."""
    if not PartialState().is_main_process:
        return
    config = task.config
    folder = out / "guidance-only" if task.stage == 0 else target / "meanflow"
    about = {**told, "guidance": config.guidance, "teacher_guidance": task.context.guidance, "max_interval": config.max_interval,
             "guidance_only": task.context.guidance_only, "validation": facts}  # fmt: skip
    store(task.nets, folder, "meanflow.json", about | {"config": config.model_dump(), "optim": task.optim.model_dump()})
