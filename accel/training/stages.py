"""The stages of a distillation one after the other: train, look at held-out prompts, keep the student, go on."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import torch
from accelerate import PartialState
from torch import Tensor, nn

from .loop import Task, any_process, fit, save_atomically, trainable
from .networks import Networks, velocity
from .optim import OptimConfig
from .rollouts import RolloutContext, TrajectoryPool, rollout

POINTS = 6  # places on the way at which a jump is compared with the teacher's
DIVERGED = 2.0  # times the error that a stage began with, at which it is ended
EVERY = 25  # iterations between looks


class StagedTask(Task, Protocol):
    """A task of several stages, each of which teaches the student that the one before left."""

    stage: int
    nets: Networks
    context: RolloutContext
    empty: Tensor  # the embedding (1, n, d) of no words

    @property
    def stages(self) -> dict[str, int]: ...  # name -> base steps of the jump that its student is looked at with
    @property
    def best(self) -> bool: ...  # whether the best student seen is the one to keep
    @property
    def diverged(self) -> bool: ...  # whether the stage should end for a reason of the task's own
    def spread_timesteps(self) -> None: ...  # before the first iteration of all


class StudentTask:
    """What the tasks share whose student is taught by a guided teacher, at slots that a process has its share of."""

    def __init__(
        self, optim: OptimConfig, nets: Networks, context: RolloutContext, trajectories: int, share: tuple[int, int]
    ):
        """`slots`: over all processes; `share`: which process this is, of how many."""
        self.optim, self.nets, self.context, self.stage = optim, nets, context, 0
        self.empty = context.encode([""])
        self.trajectories = TrajectoryPool(context, trajectories, share, optim.seed)

    @property
    def module(self) -> nn.Module:
        """What learns."""
        return self.nets.module

    def matrices(self) -> list[nn.Parameter]:
        """Of it, for Muon."""
        return self.nets.matrices()

    def state_dict(self) -> dict[str, Tensor]:
        """What a resumed run needs beside the weights: the slots."""
        return self.trajectories.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """The inverse, from the slots of all processes."""
        self.trajectories.load_state_dict(state)


class TrajectoryValidator:
    """The guided teacher's ways (p, N + 1, c, f, h, w) from prompts and noises unknown to training, walked once."""

    def __init__(self, task: StagedTask, prompts: list[str], guidance: float, seed: int = 1):
        context, nets = task.context, task.nets
        self.task, self.words = task, context.encode(prompts)
        noise = torch.Generator().manual_seed(seed)
        x = torch.randn(len(prompts), *context.shape, generator=noise).to(self.words.device)
        ways = [x]
        for i, t in enumerate(context.times):
            v = nets.teacher(x, t.expand(len(x)).to(x.device), self.words, task.empty, guidance)
            x = context.jump(x, v, i, i + 1)
            ways.append(x)
        self.ways = torch.stack(ways, 1)

    def named(self, k: int) -> str:
        """What `jump` is the error of."""
        return f"{k} steps in one" if k > 1 else "a step"

    @torch.no_grad()
    def jump(self, model: nn.Module, k: int) -> float:
        """Mean squared error of the velocity of jumps of k base steps, against the teacher's k steps."""
        places = range(0, len(self.task.context.times), k)
        places = places[:: max(1, math.ceil(len(places) / POINTS))]
        return sum(self._jump(model, i, k) for i in places) / len(places)

    def _jump(self, model: nn.Module, i: int, k: int) -> float:
        context, x = self.task.context, self.ways[:, i]
        j = min(i + k, len(context.times))
        whole = (self.ways[:, j] - x) / float(context.levels[j] - context.levels[i])
        return (velocity(model, x, context.told(x, i, j), self.words) - whole).square().mean().item()

    @torch.no_grad()
    def end(self, model: nn.Module, k: int) -> float:
        """Squared error of the student's video latents, in parts of the teacher's mean square."""
        x, goal = rollout(model, self.task.context, self.ways[:, 0], self.words, k), self.ways[:, -1]
        return ((x - goal).square().mean() / goal.square().mean()).item()


class StageMonitor:
    """Looks at the held-out error of a stage, keeps the best student seen, and ends a stage that diverges.

    What it has seen is in a file, so that a resumed stage goes on looking where it stood.
    """

    def __init__(self, held: TrajectoryValidator, model: nn.Module, horizon: int, file: Path, resume: bool):
        self.held, self.model, self.horizon, self.file = held, model, horizon, file
        self.errors: dict[int, float] = {}
        self.best: list[Tensor] = []
        if resume and file.is_file():
            seen = torch.load(file, weights_only=True)
            self.errors, self.best = seen["errors"], seen["best"]
        else:
            self.look(0)

    def look(self, step: int) -> bool:
        """Measure the student as it stands; whether the stage should end."""
        error = self.held.jump(self.model, self.horizon)
        what = self.held.named(self.horizon)
        print(f"held-out error of {what}: {error:.4f} after {step} iterations", file=sys.stderr)
        if not self.errors or error < min(self.errors.values()):
            self.best = [p.detach().cpu().clone() for p in trainable(self.model)]
        self.errors[step] = error
        if PartialState().is_main_process:
            save_atomically({"errors": self.errors, "best": self.best}, self.file)
        if self.diverged:
            print(f"that is over {DIVERGED:g} times what it began with: the stage ends", file=sys.stderr)
        return self.diverged

    @property
    def diverged(self) -> bool:
        """Whether the error was much larger at the latest look than at the first one."""
        return self.errors[max(self.errors)] > DIVERGED * self.errors[0]

    @torch.no_grad()
    def restore(self) -> None:
        """Give the student the best weights seen."""
        for weight, best in zip(trainable(self.model), self.best, strict=True):
            weight.copy_(best)


def store(nets: Networks, folder: Path, name: str, facts: dict) -> None:
    """A student as a file of weights, by its difference from the base, and what is known of it as `name`."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.safetensors"):  # of an adapter, where this one has full weights, or the other way round
        old.unlink()
    nets.save(folder)
    (folder / name).write_text(json.dumps(facts, indent=1) + "\n")


def distil(
    task: StagedTask, held: TrajectoryValidator, optims: Sequence[OptimConfig], out: Path, keep: Callable[[dict], None],
    minutes: float | None = None, resume: bool = False,
) -> dict:  # fmt: skip
    """Train all stages, or as far as the time goes; what each came to. `keep(facts)` stores a stage's student.

    A stage that is finished leaves `done.json` and `student.pt`, and is not trained again. After Ctrl-C what comes back
    has "stopped".
    """
    began, stages, stopped = time.monotonic(), {}, {}
    for stage, (name, horizon) in enumerate(task.stages.items()):
        task.stage, task.optim, folder = stage, optims[stage], out / name
        done = folder / "done.json"
        if resume and done.is_file():
            _restore(task, folder)
            stages[name] = json.loads(done.read_text())
        else:
            left = remaining(minutes, began)
            if any_process(left is not None and left <= 0):
                break
            done_now, stopped = _train(task, horizon, held, folder, left, resume)
            if done_now is None:
                break
            stages[name] = done_now
            keep(stages[name])
            if PartialState().is_main_process:
                done.write_text(json.dumps(stages[name]) + "\n")
        task.nets.next_stage()
        if stopped:
            break
    return {"stages": stages, "finished": len(stages) == len(task.stages), **stopped}


def _train(
    task, horizon: int, held: TrajectoryValidator, folder: Path, minutes: float | None, resume: bool
) -> tuple[dict | None, dict]:
    """Train one stage, and leave its student in the task and in `student.pt`; whether it was stopped, as {"stopped"}.

    None in place of what it came to if it is not at its end.
    """
    begun = resume and (folder / "state.pt").is_file()
    if task.stage == 0 and not begun:
        task.spread_timesteps()
    folder.mkdir(parents=True, exist_ok=True)
    watch = StageMonitor(held, task.module, horizon, folder / "watch.pt", begun)
    over = lambda step: watch.look(step) or task.diverged
    summary = fit(task, folder, minutes=minutes, resume=resume, should_end=over, check_every=EVERY)
    stopped = {"stopped": True} if summary.pop("stopped", False) else {}
    if summary["step"] < summary["steps"] and "ended" not in summary:
        return None, stopped
    if summary["step"] not in watch.errors:
        watch.look(summary["step"])
    if task.best or watch.diverged:
        watch.restore()
    if PartialState().is_main_process:
        torch.save([p.detach().cpu() for p in trainable(task.module)], folder / "student.pt")
    errors = {"velocity_mse": held.jump(task.module, horizon), "final_latent_error": held.end(task.module, horizon)}
    return {**summary, **errors, "validation_curve": watch.errors}, stopped


@torch.no_grad()
def _restore(task: StagedTask, folder: Path) -> None:
    """The student that a finished stage left, and its slots."""
    for weight, kept in zip(trainable(task.module), torch.load(folder / "student.pt", weights_only=True), strict=True):
        weight.copy_(kept)
    task.load_state_dict(torch.load(folder / "state.pt", map_location="cpu", weights_only=True)["task"])


def remaining(minutes: float | None, began: float) -> float | None:
    """Minutes that are left of those given since a reading of the monotonic clock; None: no end."""
    return None if minutes is None else minutes - (time.monotonic() - began) / 60


def totals(optims: Sequence[OptimConfig], done: dict) -> dict:
    """What `distil` did, and the sums over its stages: iterations made and planned, seconds."""
    spent = {key: sum(stage[key] for stage in done["stages"].values()) for key in ("step", "seconds")}
    return {**spent, "steps": sum(r.steps for r in optims), **done}
