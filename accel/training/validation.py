"""Validation during a distillation: rollouts from fixed prompts and noise, and the monitor that follows their error."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Protocol

import torch
from accelerate import PartialState
from torch import Tensor, nn

from .loop import save_atomically, trainable
from .networks import velocity
from .rollouts import progress, rollout
from .tasks.predictor_fit import PredictorTask
from .tasks.student_task import StudentTask

VALIDATION = "rollouts of the validation prompts"
MAX_POINTS = 6  # base steps at which the student's jump is compared with the teacher's
DIVERGENCE_FACTOR = 2.0  # a stage ends when its error exceeds its first error this many times


class Validator(Protocol):
    """Measures a student; k is the number of base steps in one of its jumps."""

    def describe(self, k: int) -> str: ...  # what `error` measures
    def error(self, model: nn.Module, k: int) -> float: ...  # of single jumps: what a stage minimizes
    def final_latent_error(self, model: nn.Module, k: int) -> float: ...  # of a full rollout


class TrajectoryValidator:
    """Compares a student with trajectories (p, N + 1, c, f, h, w) of its guided teacher, computed once."""

    def __init__(self, task: StudentTask, prompts: list[str], guidance: float, seed: int = 1):
        """The p prompts and the seed of the noise must not occur in training."""
        context = task.context
        self.task, self.text = task, context.encode(prompts)
        x = _noise(len(prompts), context.shape, seed).to(self.text.device)
        states = [x]
        for i in progress(len(context.timesteps), VALIDATION):
            t = context.timesteps[i].expand(len(x)).to(x.device)
            x = context.step(x, task.nets.teacher(x, t, self.text, task.empty, guidance), i, i + 1)
            states.append(x)
        self.states = torch.stack(states, 1)

    def describe(self, k: int) -> str:
        """What `error` measures, in words."""
        return f"{k} steps in one" if k > 1 else "a step"

    @torch.no_grad()
    def error(self, model: nn.Module, k: int) -> float:
        """Mean squared error of the velocity of jumps of k base steps, relative to the teacher's k steps."""
        starts = range(0, len(self.task.context.timesteps), k)
        starts = starts[:: max(1, math.ceil(len(starts) / MAX_POINTS))]
        return sum(self._velocity_mse(model, i, k) for i in starts) / len(starts)

    def _velocity_mse(self, model: nn.Module, i: int, k: int) -> float:
        context, x = self.task.context, self.states[:, i]
        j = min(i + k, len(context.timesteps))
        target = (self.states[:, j] - x) / float(context.sigmas[j] - context.sigmas[i])
        return (velocity(model, x, context.batch_timestep(x, i, j), self.text) - target).square().mean().item()

    @torch.no_grad()
    def final_latent_error(self, model: nn.Module, k: int) -> float:
        """Mean squared error of the student's final latents, divided by the mean square of the teacher's."""
        x, target = rollout(model, self.task.context, self.states[:, 0], self.text, k), self.states[:, -1]
        return ((x - target).square().mean() / target.square().mean()).item()


class CachedRolloutValidator:
    """Compares cached rollouts of a predictor with rollouts of its student in full forward passes, computed once."""

    def __init__(self, task: PredictorTask, prompts: list[str], full_steps: list[int], seed: int = 1):
        """`full_steps`: the steps with full forward passes in a cached rollout, the first step among them."""
        self.task, self.full_steps, self.steps = task, full_steps, len(task.context.timesteps)
        self.text = task.context.encode(prompts)
        x = _noise(len(prompts), task.context.shape, seed).to(self.text.device)
        self.states = [x]
        for i in progress(self.steps, VALIDATION):
            x = task.context.step(x, self._full_forward(x, i)[0], i, i + 1)
            self.states.append(x)

    def describe(self, _: int) -> str:
        """What `error` measures, in words."""
        return "the steps between full forward passes"

    def error(self, model: nn.Module, _: int) -> float:
        """Mean squared error after each run of predicted steps, divided by the mean square of the true change.

        Each run starts with a full step on the student's own trajectory and ends before the next full step.
        """
        errors = []
        for i, j in zip(self.full_steps, [*self.full_steps[1:], self.steps]):
            if j > i + 1:
                start, target = self.states[i], self.states[j]
                x = self._rollout(model, start, range(i, j))
                errors.append(((x - target).square().mean() / (target - start).square().mean()).item())
        return sum(errors) / max(1, len(errors))

    def final_latent_error(self, model: nn.Module, _: int) -> float:
        """Mean squared error of the final latents of a cached rollout, divided by the mean square of the student's."""
        x = self._rollout(model, self.states[0], range(self.steps))
        return ((x - self.states[-1]).square().mean() / self.states[-1].square().mean()).item()

    def _rollout(self, model: nn.Module, x: Tensor, steps: range) -> Tensor:
        """Latents after some steps, of which the first is a full step."""
        cached, full = None, 0
        for i in steps:
            if i in self.full_steps:
                full, (v, cached) = i, self._full_forward(x, i)
            else:
                v = self._predicted_forward(model, cached, full, x, i)
            x = self.task.context.step(x, v, i, i + 1)
        return x

    @torch.no_grad()
    def _full_forward(self, x: Tensor, i: int) -> tuple[Tensor, Tensor]:
        return self.task.student.full_forward(x, self.task.context.batch_timestep(x, i, i + 1), self.text)

    @torch.no_grad()
    def _predicted_forward(self, model: nn.Module, cached: Tensor, full: int, x: Tensor, i: int) -> Tensor:
        context = self.task.context
        t, gap = context.batch_timestep(x, i, i + 1), x.new_full((len(x),), context.sigmas[full] - context.sigmas[i])
        return self.task.student.predicted_forward(model.predictor, cached, gap, x, t, self.text)[0]


class StageMonitor:
    """Validates a stage at intervals, keeps its best student, and ends it when it diverges.

    Errors and best weights are in a file, so that a resumed stage continues where it stopped.
    """

    def __init__(self, validator: Validator, model: nn.Module, horizon: int, file: Path, resume: bool):
        self.validator, self.model, self.horizon, self.file = validator, model, horizon, file
        self.errors: dict[int, float] = {}
        self.best: list[Tensor] = []
        if resume and file.is_file():
            state = torch.load(file, weights_only=True)
            self.errors, self.best = state["errors"], state["best"]
        else:
            self.validate(0)

    def validate(self, step: int) -> bool:
        """Measure the current student; returns whether the stage should end."""
        error = self.validator.error(self.model, self.horizon)
        what = self.validator.describe(self.horizon)
        print(f"validation error of {what}: {error:.4f} after {step} iterations", file=sys.stderr)
        if not self.errors or error < min(self.errors.values()):
            self.best = [p.detach().cpu().clone() for p in trainable(self.model)]
        self.errors[step] = error
        if PartialState().is_main_process:
            save_atomically({"errors": self.errors, "best": self.best}, self.file)
        if self.diverged:
            print(f"this is more than {DIVERGENCE_FACTOR:g} times the first error: the stage ends", file=sys.stderr)
        return self.diverged

    @property
    def diverged(self) -> bool:
        """Whether the latest error is much larger than the first one."""
        return self.errors[max(self.errors)] > DIVERGENCE_FACTOR * self.errors[0]

    @torch.no_grad()
    def restore_best(self) -> None:
        """Give the student the weights with the lowest error."""
        for weight, best in zip(trainable(self.model), self.best, strict=True):
            weight.copy_(best)


def _noise(count: int, shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed))
