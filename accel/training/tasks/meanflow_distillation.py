"""Restricted MeanFlow (DisCa, arXiv 2602.05449): guidance distilled first, then mean velocities over short intervals.

First stage: one call, told a guidance, gives what the base gives in two. Second stage: one call, told where its step
ends, gives the mean velocity u up to there. Its target follows from the MeanFlow identity, u = v - (t - r) du/dt, with
v from the first stage's frozen student (or, in an arm, from the guided base itself); intervals t - r are drawn from
[0, R], as the term that feeds the network's own errors back is multiplied by their length. R = 1 is plain MeanFlow.
Data-free: captions and noise.
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
from ..optim import OptimConfig
from ..rollouts import MeanFlowContext, sample_grid
from ..stages import StudentTask

SEEN = 25  # iterations that the size of the correction is averaged over
GROWN = 20.0  # times its first size, at which it is too much


class MeanFlowConfig(BaseModel, frozen=True, extra="forbid"):
    """What both stages do, apart from their optimizers."""

    base_steps: int = Field(60, ge=1)  # of the grid that trajectories run on
    steps: tuple[int, ...] = (20, 10)  # numbers of steps that the student is made for
    guidance: tuple[float, float] = (2.0, 5.0)
    max_interval: float = Field(gt=0, le=1)  # R
    limit_to_schedule: bool = True  # at most as far as the schedule of the fewest steps goes from that level
    zero_interval_fraction: float = Field(0.5, ge=0, lt=1)  # share of the slots with r = t
    source: Literal["student", "base"] = "student"  # of the second stage's velocities: the first's, or the guided base
    jvp: Literal["central", "exact"] = "central"
    eps: float = Field(5e-3, gt=0, lt=0.5)  # of the central difference
    warm: int = Field(100, ge=1)  # iterations in which the correction comes in
    trajectories: int = Field(16, ge=1)  # trajectories that are carried, over all processes
    max_stride: int = Field(12, ge=1)  # most base steps a slot moves on in one iteration

    @property
    def stages(self) -> dict[str, int]:
        """Names, and the max_interval jump that each one's student is looked at with."""
        return {"guidance": 1, "mean_velocity": self.base_steps // min(self.steps)}


def max_step_width(scheduler, steps: tuple[int, ...]) -> float:
    """The widest interval between noise levels that a pipeline's scheduler makes in these numbers of steps: R."""
    widths = []
    for n in steps:
        scheduler.set_timesteps(n)
        widths.append(float(-scheduler.sigmas.double().diff().min()))
    return max(widths)


class MeanFlowTask(StudentTask):
    """Both stages; a process carries its share of the slots."""

    def __init__(
        self,
        optim: OptimConfig,
        config: MeanFlowConfig,
        nets: Networks,
        context: MeanFlowContext,
        share: tuple[int, int] = (0, 1),
    ):
        """`share`: which process this is, of how many."""
        super().__init__(optim, nets, context, config.trajectories, share)
        self.config = config
        self.sizes = torch.zeros(3)  # of the correction: how many were seen, the mean of the first, and of the latest
        _keep_zeros(nets.module.condition_embedder.base.time_embedder)

    best = True

    @property
    def stage(self) -> int:
        """Which stage is on; the first one's student knows velocities, not means."""
        return self._stage

    @stage.setter
    def stage(self, stage: int) -> None:
        self._stage, self.context = stage, replace(self.context, guidance_only=stage == 0)

    @property
    def stages(self) -> dict[str, int]:
        """Names of the stages, and the jumps that their students are looked at with."""
        return self.config.stages

    @property
    def diverged(self) -> bool:
        """Whether the network feeds on its own errors: its correction has grown many times."""
        count, first, latest = self.sizes.tolist()
        return count >= 2 * SEEN and latest > GROWN * first

    def loss(self, model: nn.Module, step: int, seed: int) -> tuple[Tensor, dict[str, float]]:
        """The student's error at the slots, which then move on."""
        trajectories = self.trajectories
        now = self.context.levels[trajectories.index].float()
        w = trajectories.uniform(*self.config.guidance, "guidance")
        if self.stage == 0 or self.config.source == "base":
            v = self.nets.teacher(
                trajectories.x, 1000 * now.to(trajectories.x.device), trajectories.words, self.empty, w
            )
        else:
            v = self.nets.previous(trajectories.x, self._told(now, now, w), trajectories.words)
        then, target, logs = now, v, {}
        if self.stage == 1:
            then = self.ends(now, step)
            target, logs = self._corrected(v, now, then, w, step)
        u = velocity(model, trajectories.x, self._told(now, then, w), trajectories.words)
        self._move(v, step)
        return (u - target).square().mean(), logs

    def ends(self, now: Tensor, step: int) -> Tensor:
        """Where the intervals from levels `now` (s,) end: their lengths are uniform in [0, R], or 0 for a share.

        A shifted schedule makes short steps where there is much noise, where guided velocities change most: there R is
        the step that it makes, or the correction would be many times the velocity.
        """
        farthest = (now - self.config.max_interval).clamp(min=0)
        if self.config.limit_to_schedule:
            beyond = (self.trajectories.index + self.stages["mean_velocity"]).clamp(max=self.config.base_steps)
            farthest = torch.maximum(farthest, self.context.levels[beyond].float())
        shares = self.trajectories.uniform(0, 1, "length", step)
        moving = len(now) * (1 - self.config.zero_interval_fraction)
        first, *_ = self.trajectories.rngs("count", step)
        count = int(moving) + (first.random() < moving % 1)  # always the same where it is whole
        order = self.trajectories.uniform(0, 1, "end", step).argsort()
        shares[order[count:]] = 0
        return now - shares * (now - farthest)

    def _corrected(self, v: Tensor, now: Tensor, then: Tensor, w: Tensor, step: int) -> tuple[Tensor, dict[str, float]]:
        """The target of the mean velocity: v where an interval is empty."""
        moving = (then < now).nonzero().flatten()
        if not len(moving):
            return v, {}
        slope = self.slope(v[moving], now[moving], then[moving], w[moving], moving)
        warm = min(1.0, (step + 1) / self.config.warm)
        target = v.clone()
        target[moving] = mean_flow_target(v[moving], warm * slope, now[moving], then[moving])
        size = (target - v)[moving].square().mean().item() / warm**2
        if step >= self.config.warm:
            self._watch(size)
        return target, {"correction": size, "velocity": v.square().mean().item()}

    def _watch(self, size: float) -> None:
        """Follow the size of the correction, and say so when it has grown too much."""
        if self.sizes[0] < SEEN:
            self.sizes[1] += size / SEEN
            self.sizes[2] = self.sizes[1]
        else:
            self.sizes[2] += (size - self.sizes[2]) / SEEN
        self.sizes[0] += 1
        if self.diverged:
            print(f"the correction (t - r) du/dt has grown {GROWN:g}-fold: the stage ends; a lower rate or R is needed",
                  file=sys.stderr)  # fmt: skip

    @torch.no_grad()
    def slope(self, v: Tensor, now: Tensor, then: Tensor, w: Tensor, which: Tensor) -> Tensor:
        """du/dt (m, ...) of the student as it stands, along the path, at some of the slots."""
        x, words = self.trajectories.x[which], self.trajectories.words[which]
        now, then, w = (a.to(x.device) for a in (now, then, w))
        u = lambda x, level: velocity(self.module, x, pack_timestep(level, then, w), words, fine=True)
        if self.config.jvp == "central":
            return jvp_central(u, x, now, v, then, self.config.eps)
        with torch.compiler.set_stance("force_eager"), sdpa_kernel(SDPBackend.MATH):
            return jvp_exact(u, x, now, v)

    def _told(self, now: Tensor, then: Tensor, w: Tensor) -> Tensor:
        return pack_timestep(now, then, w).to(self.trajectories.x.device)

    def _move(self, v: Tensor, step: int) -> None:
        """Carry each slot some base steps on, along the teacher's velocity."""
        far = [rng.randint(1, self.config.max_stride) for rng in self.trajectories.rngs("move", step)]
        self.trajectories.move(v, (self.trajectories.index + torch.tensor(far)).clamp(max=self.config.base_steps))

    def spread_timesteps(self) -> None:
        """Let the guided teacher carry each slot to a place of its own."""
        trajectories, middle = self.trajectories, sum(self.config.guidance) / 2

        def guided(now: Tensor) -> Tensor:
            time = 1000 * self.context.levels[now].float().to(trajectories.x.device)
            return self.nets.teacher(trajectories.x, time, trajectories.words, self.empty, middle)

        trajectories.spread_timesteps(guided, self.config.max_stride)

    def sample_grid(self, path: Path) -> None:
        """Four prompts, from noise to the end in the fewest steps that the student is made for."""
        sample_grid(self.module, self.context, self.stages["mean_velocity"], path)

    def state_dict(self) -> dict[str, Tensor]:
        """What a resumed run needs beside the weights: the slots, and what was seen of the correction."""
        return {**super().state_dict(), "sizes": self.sizes.expand(len(self.trajectories), -1)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """The inverse, from the slots of all processes."""
        super().load_state_dict(state)
        if "sizes" in state:
            self.sizes = state["sizes"][self.trajectories.first].clone()


def _keep_zeros(layer: nn.Module) -> None:
    """Weights that are zero stay so: time frequencies that the base does not see (`smooth_time`) stay unseen."""
    for name, weight in layer.named_parameters():
        if weight.requires_grad and ".lora_" not in name:  # those of adapters begin at zero
            seen = weight.detach() != 0
            weight.register_hook(lambda grad, seen=seen: grad * seen)
