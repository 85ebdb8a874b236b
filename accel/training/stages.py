"""Runs the stages of a distillation one after the other: train, validate, store the student, continue."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from accelerate import PartialState

from ..files import read_json, write_json
from .loop import any_process, fit, save_atomically, trainable
from .networks import Networks
from .optimizer import OptimConfig
from .tasks.student_task import StagedTask
from .validation import StageMonitor, Validator

VALIDATE_EVERY = 25  # iterations


def distil(
    task: StagedTask, validator: Validator, optims: Sequence[OptimConfig], out: Path,
    save_stage: Callable[[dict], None], minutes: float | None = None, resume: bool = False, save_every: float = 400,
) -> dict:  # fmt: skip
    """Train all stages, or as many as the time allows; returns a summary with the results of each finished stage.

    The main process calls `save_stage(results)` to store a stage's student. A finished stage leaves `done.json` and
    `student.pt` in its folder and is not trained again on resume. After Ctrl-C the summary has "stopped".
    `save_every`: seconds between checkpoints.
    """
    began, stages, stopped = time.monotonic(), {}, {}
    for stage, (name, horizon) in enumerate(task.stages.items()):
        task.stage, task.optim, folder = stage, optims[stage], out / name
        done = folder / "done.json"
        if resume and done.is_file():
            _restore(task, folder)
            stages[name] = read_json(done)
        else:
            left = partial(remaining, minutes, began)
            if any_process(minutes is not None and left() <= 0):
                break
            results, stopped = _train(task, horizon, validator, folder, left, resume, save_every)
            if results is None:
                break
            stages[name] = results
            if PartialState().is_main_process:
                save_stage(results)
                write_json(done, results)
        task.nets.next_stage()
        if stopped:
            break
    return {"stages": stages, "finished": len(stages) == len(task.stages), **stopped}


def _train(
    task: StagedTask, horizon: int, validator: Validator, folder: Path, left: Callable[[], float | None], resume: bool,
    save_every: float,
) -> tuple[dict | None, dict]:  # fmt: skip
    """Train one stage and leave its student in the task and in `student.pt`.

    Returns the results, or None if the stage is not finished, and {"stopped": True} after Ctrl-C, else {}. `left` gives
    the minutes that are left: what comes before the first step takes some.
    """
    begun = resume and (folder / "state.pt").is_file()
    if task.stage == 0 and not begun:
        task.spread_timesteps()
    folder.mkdir(parents=True, exist_ok=True)
    monitor = StageMonitor(validator, task.module, horizon, folder / "monitor.pt", begun)
    should_end = lambda step: monitor.validate(step) or task.diverged
    summary = fit(
        task, folder, minutes=left(), resume=resume, save_every=save_every, should_end=should_end,
        check_every=VALIDATE_EVERY,
    )  # fmt: skip
    stopped = {"stopped": True} if summary.pop("stopped", False) else {}
    if summary["step"] < summary["steps"] and "ended" not in summary:
        return None, stopped
    if summary["step"] not in monitor.errors:
        monitor.validate(summary["step"])
    if task.keep_best or monitor.diverged:
        monitor.restore_best()
    if PartialState().is_main_process:
        save_atomically([p.detach().cpu() for p in trainable(task.module)], folder / "student.pt")
    errors = {
        "velocity_mse": validator.error(task.module, horizon),
        "final_latent_error": validator.final_latent_error(task.module, horizon),
    }
    return {**summary, **errors, "validation_curve": monitor.errors}, stopped


@torch.no_grad()
def _restore(task: StagedTask, folder: Path) -> None:
    """Load the student and the trajectories of a finished stage."""
    for weight, saved in zip(trainable(task.module), torch.load(folder / "student.pt", weights_only=True), strict=True):
        weight.copy_(saved)
    task.load_state_dict(torch.load(folder / "state.pt", map_location="cpu", weights_only=True)["task"])


def remaining(minutes: float | None, began: float) -> float | None:
    """Minutes left since `began`, a reading of the monotonic clock; None without a limit."""
    return None if minutes is None else minutes - (time.monotonic() - began) / 60


def totals(optims: Sequence[OptimConfig], done: dict) -> dict:
    """A summary of `distil` with the sums over its stages: iterations made and planned, seconds."""
    spent = {key: sum(stage[key] for stage in done["stages"].values()) for key in ("step", "seconds")}
    return {**spent, "steps": sum(optim.steps for optim in optims), **done}


def store(nets: Networks, folder: Path, name: str, facts: dict) -> None:
    """Write a student to a folder: its weights, and a manifest `name` with facts about it."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.safetensors"):  # LoRA and full weights have different names
        old.unlink()
    nets.save(folder)
    write_json(folder / name, facts)
