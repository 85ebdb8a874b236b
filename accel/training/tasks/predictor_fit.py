"""Trains DisCa's predictor (arXiv 2602.05449) on trajectories of the student that it accelerates.

Trajectories are rolled out exactly as at inference: full forward passes at a few steps, spread as at inference, refresh
the cached output of the student's blocks; at the other steps the predictor replaces the blocks, and the trajectory
follows its prediction. The target at a predicted step leads, by the next full step, to where full forward passes since
the last one would have led, so the predictor also learns to correct its own errors. First stage: squared error. Second
stage, where it has a weight: also a discriminator (hinge loss) on the frozen student's features one step later. The
paper, as far as it says, compares predictions with the student on the student's own trajectory.

A `GuidedProbe` in the student's place trains a predictor of the base model itself, under guidance: not in the paper.
It takes Euler steps, whatever the pipeline's solver is.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate.utils import reduce
from pydantic import BaseModel, Field, computed_field, model_validator
from safetensors.torch import save_file
from torch import Tensor, nn

from ...methods.disca.disca import max_gap, select_full_steps
from ...methods.disca.predictor import Predictor
from ...ops.flow import euler, expand_like
from ...students.interval_embedding import pack_timestep
from ..discriminator import Discriminator, accuracy, hinge
from ..feature_probe import FeatureProbe, GuidedProbe
from ..optimizer import OptimConfig
from ..rollouts import RolloutContext, TrajectoryPool, progress


class PredictorConfig(BaseModel, frozen=True, extra="forbid"):
    """Settings of both stages, apart from those of their optimizers."""

    steps: int = Field(20, ge=2)  # of the student at inference
    strides: tuple[int, ...] = (1, 2)  # a run with stride 2 makes half as many steps, each twice as long
    full: tuple[int, int] = (7, 12)  # fewest and most full steps in a run of all steps; proportionally in shorter ones
    guidance: tuple[float, float] | None  # that the student is given; None for the base model
    feature: float = Field(0.1, ge=0)  # loss weight of the feature's squared error, relative to its variance
    adversarial: float = Field(0.1, ge=0)  # weight of the discriminator in the second stage; 0: no such stage
    trajectories: int = Field(16, ge=1)  # over all processes

    @model_validator(mode="after")
    def _has_predicted_steps(self) -> PredictorConfig:
        for stride in self.strides:
            if self.steps % stride or self._num_full_steps(stride)[1] >= self.steps // stride:
                raise ValueError(f"runs of {self.steps} steps with stride {stride} leave nothing to predict")
        return self

    def _num_full_steps(self, stride: int) -> tuple[int, int]:
        """Fewest and most full steps in a run."""
        fewest = max(2, math.ceil(self.full[0] / stride))
        return fewest, max(fewest, self.full[1] // stride)

    @computed_field
    @property
    def supported_runs(self) -> dict[int, int]:
        """Step counts of the runs in training, and the most steps from one full step to the next in each."""
        counts = {self.steps // stride: self._num_full_steps(stride)[0] for stride in self.strides}
        return {count: max_gap(select_full_steps(full, count)) for count, full in counts.items()}

    def draw_run(self, rng: random.Random) -> tuple[int, list[int]]:
        """A random run: its stride, and its full steps as indices into the schedule of all steps."""
        stride = rng.choice(self.strides)
        num_full_steps = rng.randint(*self._num_full_steps(stride))
        return stride, [stride * step for step in select_full_steps(num_full_steps, self.steps // stride)]


class Runs(NamedTuple):
    """Where the trajectories are in their runs; each tensor is (s,)."""

    stride: Tensor  # base steps in a step
    is_full: Tensor  # whether the present step is a full one
    full: Tensor  # base step of the last full step, the present one included
    next_full: Tensor  # base step of the next one, or of the end


class PredictorWithDiscriminator(nn.Module):
    """All trained parameters. Its forward computes a whole loss, so that DDP synchronizes the gradients."""

    def __init__(self, predictor: Predictor, discriminator: Discriminator):
        super().__init__()
        self.predictor, self.discriminator = predictor, discriminator

    def forward(self, loss: Callable[[PredictorWithDiscriminator], Tensor]) -> Tensor:
        return loss(self)


class PredictorTask:
    """Trains both stages on this process's trajectories.

    Per trajectory it holds the feature (n, d) of the last full step, `cached`, and the latents (c, f, h, w) to which
    full forward passes since that step have led, `reference`.
    """

    diverged = False  # only the validation error ends a stage

    def __init__(
        self, optim: OptimConfig, config: PredictorConfig, student: FeatureProbe | GuidedProbe, predictor: Predictor,
        context: RolloutContext, tokens: tuple[int, int, int], rank_and_world: tuple[int, int] = (0, 1),
    ):  # fmt: skip
        """`tokens`: the token grid (f, h, w) of the student."""
        self.optim, self.config, self.student, self.context = optim, config, student, context
        self.tokens, self.nets = tokens, self
        width = predictor.fuse[-1].out_features
        self.trajectories = TrajectoryPool(context, config.trajectories, rank_and_world, optim.seed)
        device = self.trajectories.x.device
        n = student.branches * math.prod(tokens)
        self.cached = torch.zeros(len(self.trajectories), n, width, device=device)
        self.reference = self.trajectories.x.clone()
        discriminator = Discriminator(width, len(student.layers))
        self.module = PredictorWithDiscriminator(predictor, discriminator).to(device)
        self.stage = 0

    @property
    def stages(self) -> dict[str, int]:
        """The stages by name; the horizon of both is 1."""
        return {"regression": 1, "adversarial": 1} if self.config.adversarial else {"regression": 1}

    @property
    def stage(self) -> int:
        """Number of the stage; only the second one trains the discriminator."""
        return self._stage

    @stage.setter
    def stage(self, stage: int) -> None:
        self._stage = stage
        self.module.discriminator.requires_grad_(stage == 1)

    @property
    def keep_best(self) -> bool:
        """Only in the first stage: validation measures squared error, which the second stage gives up in part."""
        return self.stage == 0

    def matrices(self) -> list[nn.Parameter]:
        """Two-dimensional parameters of the predictor, which Muon trains."""
        return [p for p in self.module.predictor.parameters() if p.ndim == 2]

    def loss(self, model: nn.Module, step: int, seed: int) -> tuple[Tensor, dict[str, float]]:
        """The predictor's error on the trajectories at predicted steps; then all trajectories move on.

        While a process has only trajectories at full steps, full forward passes move these on first.
        """
        logs: dict[str, float] = {}
        while self.runs().is_full.all():
            v, feature = self._full_forward()
            self._move(v, v, feature)
        return model(lambda module: self._loss(module, logs)), logs

    def _loss(self, module: PredictorWithDiscriminator, logs: dict[str, float]) -> Tensor:
        pool, is_full = self.trajectories, self.runs().is_full
        x, text, (t, r, timestep, next_timestep) = pool.x, pool.text, self._interval()
        v, feature = self._full_forward()
        u, predicted_feature = self.student.predicted_forward(
            module.predictor, self.cached, self._gap(), x, timestep, text
        )
        predicted = (~is_full).to(u)  # full steps do not count
        # The mean over processes, like that of the gradients: each predicted step has the same weight.
        weights = predicted / reduce(predicted.sum(), "mean")
        mean_square = lambda y: y.flatten(1).square().mean(1)
        target = v + (self.reference - x) / expand_like(self._until_full(), x)
        error = (weights * mean_square(u - target) / mean_square(v)).sum()
        feature_error = (weights * mean_square(predicted_feature - feature) / feature.flatten(1).var(1)).sum()
        logs |= {"velocity": error.item(), "feature": feature_error.item()}
        loss = error + self.config.feature * feature_error
        if self.stage == 1:
            ends = [euler(x, direction, t, r) for direction in (target, u)]
            loss = loss + self._adversarial_loss(module.discriminator, ends, next_timestep, text, weights, logs)
        self._move(u.detach(), v, feature)
        return loss

    def _adversarial_loss(
        self, discriminator: Discriminator, ends: list[Tensor], timestep: Tensor, text: Tensor, weights: Tensor,
        logs: dict[str, float],
    ) -> Tensor:  # fmt: skip
        """Sum of the discriminator's loss and the predictor's, from the student's features at the step's two ends.

        `ends`: the latents where the true and the predicted step end. `weights` (s,) are 0 at full steps.
        """
        with torch.no_grad():
            real = self.student.features(ends[0], timestep, text)
        fake = self.student.features(ends[1], timestep, text)
        discriminator.requires_grad_(False)
        generator_loss = hinge(discriminator(fake, self.tokens), True, weights)
        discriminator.requires_grad_(True)
        cases = ((real, True), ([feature.detach() for feature in fake], False))
        logits = [(discriminator(features, self.tokens), is_real) for features, is_real in cases]
        logs["generator_loss"] = generator_loss.item()
        logs["discriminator_accuracy"] = sum(accuracy(*case, weights) for case in logits) / 2
        return self.config.adversarial * generator_loss + sum(hinge(*case, weights) for case in logits)

    @torch.no_grad()
    def _full_forward(self) -> tuple[Tensor, Tensor]:
        """The student's velocities and last features at the reference latents, which at full steps are x."""
        return self.student.full_forward(self.reference, self._interval()[2], self.trajectories.text)

    def runs(self) -> Runs:
        """The run of each trajectory, and where it is in it."""
        runs = [self.config.draw_run(rng) for rng in self.trajectories.rngs("run")]
        places = [
            (index, [*steps, self.config.steps]) for index, (_, steps) in zip(self.trajectories.index.tolist(), runs)
        ]
        full = torch.tensor([max(step for step in steps if step <= index) for index, steps in places])
        next_full = torch.tensor([min(step for step in steps if step > index) for index, steps in places])
        return Runs(torch.tensor([stride for stride, _ in runs]), full == self.trajectories.index, full, next_full)

    def _interval(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Sigmas (s,) at start t and end r of each step; the student's timestep inputs for the step and at its end."""
        start, context, device = self.trajectories.index, self.context, self.trajectories.x.device
        end = start + self.runs().stride
        t, r = (context.sigmas[i].float() for i in (start, end))
        if self.config.guidance is None:
            return t, r, *(context.timestep(step, end).to(device) for step in (start, end))
        w = self.trajectories.uniform(*self.config.guidance, "guidance")
        return t, r, *(pack_timestep(sigma, r, w).to(device) for sigma in (t, r))

    def _gap(self) -> Tensor:
        """How much sigma has fallen since the last full step (s,)."""
        sigmas, index = self.context.sigmas, self.trajectories.index
        return (sigmas[self.runs().full] - sigmas[index]).to(self.trajectories.x)

    def _until_full(self) -> Tensor:
        """How much sigma will change until the next full step (s,), a negative number.

        Over this stretch a trajectory that is astray is to be led back. Within one step, which at high noise is a
        hundredth of it, the correction would be many times the velocity.
        """
        sigmas, index = self.context.sigmas, self.trajectories.index
        return (sigmas[self.runs().next_full] - sigmas[index]).to(self.trajectories.x)

    def _move(self, u: Tensor, v: Tensor, feature: Tensor) -> None:
        """Move trajectories by v and refresh their caches at full steps; move them by the prediction u elsewhere."""
        pool, (stride, is_full, *_) = self.trajectories, self.runs()
        self._refresh(is_full, feature)
        sigmas = (self.context.sigmas[index] for index in (pool.index, pool.index + stride))
        reference = euler(self.reference, v, *sigmas)
        pool.move(torch.where(_mask_like(is_full, u), v, u), pool.index + stride)
        is_full = self.runs().is_full  # of the next step; the first step of a run is one
        self.reference = torch.where(_mask_like(is_full, u), pool.x, reference)

    def _refresh(self, which: Tensor, feature: Tensor) -> None:
        self.cached = torch.where(_mask_like(which, feature), feature, self.cached)

    @torch.no_grad()
    def spread_timesteps(self) -> None:
        """Let the student move each trajectory to a random step, with the last full step's feature in its cache."""
        pool, stride = self.trajectories, self.runs().stride
        goal = torch.tensor([rng.randrange(self.config.steps) for rng in pool.rngs("goal")]) // stride * stride
        for _ in progress(int(((goal - pool.index) // stride).max()), "trajectories"):
            moving = pool.index < goal
            v, feature = self._full_forward()
            self._refresh(moving & self.runs().is_full, feature)
            pool.move(v, pool.index + moving * stride)
            self.reference = pool.x.clone()

    def next_stage(self) -> None:
        """Nothing: the second stage continues with the same predictor."""

    def save(self, folder: Path) -> None:
        """Save the predictor's weights in half precision."""
        weights = self.module.predictor.state_dict()
        save_file({name: w.half().cpu().contiguous() for name, w in weights.items()}, folder / "model.safetensors")

    def sample_grid(self, path: Path) -> None:
        """Nothing: a predictor makes no videos by itself."""

    def state_dict(self) -> dict[str, Tensor]:
        """What a resumed run needs besides the weights: trajectories, caches and reference latents."""
        return {**self.trajectories.state_dict(), "cached": self.cached, "reference": self.reference}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore this process's share from the state of all processes."""
        own = slice(self.trajectories.first, self.trajectories.first + len(self.trajectories))
        self.cached, self.reference = (state[name][own].to(self.cached.device) for name in ("cached", "reference"))
        self.trajectories.load_state_dict(state)


def _mask_like(mask: Tensor, x: Tensor) -> Tensor:
    """A boolean mask (b,) in the shape of x (b, ...)."""
    return expand_like(mask, x).bool()
