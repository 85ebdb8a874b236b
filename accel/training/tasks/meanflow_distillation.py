"""Restricted MeanFlow (DisCa, arXiv 2602.05449): distils the guidance first, then mean velocities of short intervals.

First stage (guidance): one call that is given the guidance replaces the base model's two. Second stage (mean_velocity):
one call that is given the end r of its step as well predicts the mean velocity u from t to r. Its target follows from
the MeanFlow identity u = v - (t - r) du/dt, with v from the frozen student of the first stage (or from the guided base
model, in an ablation). Intervals t - r are drawn from [0, R], since the term with du/dt, which feeds the student's own
errors back, grows with their length. R = 1 is plain MeanFlow. Training needs prompts and noise, but no videos.

Letters: t and r are sigmas (s,) at the start and end of an interval, w is the guidance (s,) of each trajectory.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, Field
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ...ops.flow import jvp_central, jvp_exact, mean_flow_target
from ...students.interval_embedding import pack_timestep
from ..networks import Networks, velocity
from ..optimizer import OptimConfig
from ..rollouts import MeanFlowContext, sample_grid
from .student_task import StudentTask

AVERAGED = 25  # iterations that the size of the correction is averaged over
GROWTH_LIMIT = 20.0  # the stage ends when the correction exceeds its first size this many times


class MeanFlowConfig(BaseModel, frozen=True, extra="forbid"):
    """Settings of both stages, apart from those of their optimizers."""

    base_steps: int = Field(60, ge=1)  # of the schedule that trajectories run on
    steps: tuple[int, ...] = (20, 10)  # step counts that the student is trained for
    guidance: tuple[float, float] = (2.0, 5.0)  # range that the guidance of a trajectory is drawn from
    max_interval: float = Field(gt=0, le=1)  # R
    limit_to_schedule: bool = True  # intervals end no further than a step of the schedule with the fewest steps
    zero_interval_fraction: float = Field(0.5, ge=0, lt=1)  # fraction of the trajectories with r = t
    source: Literal["student", "base"] = "student"  # of v in the second stage: first stage's student, or guided base
    jvp: Literal["central", "exact"] = "central"
    eps: float = Field(5e-3, gt=0, lt=0.5)  # half width of the central difference
    warm: int = Field(100, ge=1)  # iterations over which the correction is phased in
    trajectories: int = Field(16, ge=1)  # over all processes
    max_stride: int = Field(12, ge=1)  # most base steps per move

    @property
    def stages(self) -> dict[str, int]:
        """Names of the stages and the base steps of the jump that each student is validated with."""
        return {"guidance": 1, "mean_velocity": self.base_steps // min(self.steps)}


def max_step_width(scheduler, steps: tuple[int, ...]) -> float:
    """R: the widest interval between the sigmas of a scheduler at these step counts."""
    widths = []
    for n in steps:
        scheduler.set_timesteps(n)
        widths.append(float(-scheduler.sigmas.double().diff().min()))
    return max(widths)


class MeanFlowTask(StudentTask):
    """Trains both stages on this process's trajectories."""

    keep_best = True

    def __init__(
        self, optim: OptimConfig, config: MeanFlowConfig, nets: Networks, context: MeanFlowContext,
        rank_and_world: tuple[int, int] = (0, 1),
    ):  # fmt: skip
        super().__init__(optim, nets, context, config.trajectories, rank_and_world)
        self.config = config
        self.sizes = torch.zeros(3)  # of the correction: how many were averaged, mean of the first ones, recent mean
        _keep_zeros(nets.module.condition_embedder.base.time_embedder)

    @property
    def stage(self) -> int:
        """Number of the stage; the student of the first one has learnt velocities, not mean velocities."""
        return self._stage

    @stage.setter
    def stage(self, stage: int) -> None:
        self._stage, self.context = stage, replace(self.context, guidance_only=stage == 0)

    @property
    def stages(self) -> dict[str, int]:
        """Names of the stages and the base steps of the jump that each student is validated with."""
        return self.config.stages

    @property
    def diverged(self) -> bool:
        """Whether the correction has grown many times: the student amplifies its own errors."""
        count, first, recent = self.sizes.tolist()
        return count >= 2 * AVERAGED and recent > GROWTH_LIMIT * first

    def loss(self, model: nn.Module, step: int, seed: int) -> tuple[Tensor, dict[str, float]]:
        """The student's mean squared error on all trajectories, which then move on."""
        pool = self.trajectories
        t = self.context.sigmas[pool.index].float()
        w = pool.uniform(*self.config.guidance, "guidance")
        if self.stage == 0 or self.config.source == "base":
            v = self.nets.teacher(pool.x, 1000 * t.to(pool.x.device), pool.text, self.empty, w)
        else:
            v = self.nets.previous(pool.x, self._timestep(t, t, w), pool.text)
        r, target, logs = t, v, {}
        if self.stage == 1:
            r = self.interval_ends(t, step)
            target, logs = self._mean_velocity_target(v, t, r, w, step)
        u = velocity(model, pool.x, self._timestep(t, r, w), pool.text)
        self._move(v, step)
        return (u - target).square().mean(), logs

    def interval_ends(self, t: Tensor, step: int) -> Tensor:
        """Interval ends r (s,): the lengths t - r are uniform in [0, R], or 0 for a fraction of the trajectories.

        A shifted schedule makes short steps at high noise, where guided velocities change fastest. There the schedule's
        own step replaces R, since otherwise the correction would be many times the velocity.
        """
        furthest = (t - self.config.max_interval).clamp(min=0)
        if self.config.limit_to_schedule:
            next_step = (self.trajectories.index + self.stages["mean_velocity"]).clamp(max=self.config.base_steps)
            furthest = torch.maximum(furthest, self.context.sigmas[next_step].float())
        lengths = self.trajectories.uniform(0, 1, "length", step)
        nonzero = len(t) * (1 - self.config.zero_interval_fraction)
        first, *_ = self.trajectories.rngs("count", step)
        count = int(nonzero) + (first.random() < nonzero % 1)  # a fractional count is rounded at random
        order = self.trajectories.uniform(0, 1, "end", step).argsort()
        lengths[order[count:]] = 0
        return t - lengths * (t - furthest)

    def _mean_velocity_target(
        self, v: Tensor, t: Tensor, r: Tensor, w: Tensor, step: int
    ) -> tuple[Tensor, dict[str, float]]:
        """The target of the mean velocity, which is v where the interval is empty, and the size of the correction."""
        nonzero = (r < t).nonzero().flatten()
        if not len(nonzero):
            return v, {}
        du_dt = self.du_dt(v[nonzero], t[nonzero], r[nonzero], w[nonzero], nonzero)
        warm = min(1.0, (step + 1) / self.config.warm)
        target = v.clone()
        target[nonzero] = mean_flow_target(v[nonzero], warm * du_dt, t[nonzero], r[nonzero])
        size = (target - v)[nonzero].square().mean().item() / warm**2
        if step >= self.config.warm:
            self._record_correction(size)
        return target, {"correction": size, "velocity": v.square().mean().item()}

    def _record_correction(self, size: float) -> None:
        """Update the averages of the size of the correction; print a message when it has grown too much."""
        if self.sizes[0] < AVERAGED:
            self.sizes[1] += size / AVERAGED
            self.sizes[2] = self.sizes[1]
        else:
            self.sizes[2] += (size - self.sizes[2]) / AVERAGED
        self.sizes[0] += 1
        if self.diverged:
            print(f"the correction (t - r) du/dt has grown {GROWTH_LIMIT:g}-fold: the stage ends. "
                  "Use a lower learning rate or a smaller R.", file=sys.stderr)  # fmt: skip

    @torch.no_grad()
    def du_dt(self, v: Tensor, t: Tensor, r: Tensor, w: Tensor, which: Tensor) -> Tensor:
        """du/dt (m, c, f, h, w) of the current student along the path with velocity v, for m of the trajectories."""
        x, text = self.trajectories.x[which], self.trajectories.text[which]
        t, r, w = (a.to(x.device) for a in (t, r, w))
        u = lambda x, t: velocity(self.module, x, pack_timestep(t, r, w), text, full_precision=True)
        if self.config.jvp == "central":
            return jvp_central(u, x, t, v, r, self.config.eps)
        with torch.compiler.set_stance("force_eager"), sdpa_kernel(SDPBackend.MATH):
            return jvp_exact(u, x, t, v)

    def _timestep(self, t: Tensor, r: Tensor, w: Tensor) -> Tensor:
        return pack_timestep(t, r, w).to(self.trajectories.x.device)

    def _move(self, v: Tensor, step: int) -> None:
        """Move each trajectory some base steps along the teacher's velocity."""
        strides = [rng.randint(1, self.config.max_stride) for rng in self.trajectories.rngs("move", step)]
        self.trajectories.move(v, (self.trajectories.index + torch.tensor(strides)).clamp(max=self.config.base_steps))

    def spread_timesteps(self) -> None:
        """Let the guided teacher move each trajectory to a random base step."""
        pool, mid_guidance = self.trajectories, sum(self.config.guidance) / 2

        def guided(index: Tensor) -> Tensor:
            t = 1000 * self.context.sigmas[index].float().to(pool.x.device)
            return self.nets.teacher(pool.x, t, pool.text, self.empty, mid_guidance)

        pool.spread_timesteps(guided, self.config.max_stride)

    def sample_grid(self, path: Path) -> None:
        """Write an image of four prompts, rolled out in the fewest steps that the student is trained for."""
        sample_grid(self.module, self.context, self.stages["mean_velocity"], path)

    def state_dict(self) -> dict[str, Tensor]:
        """What a resumed run needs besides the weights: the trajectories and the averages of the correction."""
        return {**super().state_dict(), "sizes": self.sizes.expand(len(self.trajectories), -1)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore this process's share from the state of all processes."""
        super().load_state_dict(state)
        self.sizes = state["sizes"][self.trajectories.first].clone()


def _keep_zeros(layer: nn.Module) -> None:
    """Keep weights that are zero at zero: time frequencies that the base model ignores stay ignored."""
    for name, weight in layer.named_parameters():
        if weight.requires_grad and ".lora_" not in name:  # LoRA factors start at zero but are trained
            nonzero = weight.detach() != 0
            weight.register_hook(lambda grad, nonzero=nonzero: grad * nonzero)
