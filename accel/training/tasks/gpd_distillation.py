"""Guided progressive distillation (arXiv 2602.01814): 48 guided steps into 6, one base step of horizon at a time.

Stage k teaches one call to go k base steps. Its target is made on the way: the frozen student of stage k - 1 goes
k - 1 steps in one call, the frozen guided teacher does the last one, and the mean velocity of both is learnt. So an
iteration costs the same in every stage after the first, and guidance enters once per base step and is built in.
Data-free: captions and noise. The rivals (halving, direct) are other ways to the same end of a jump.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, Field
from torch import Tensor, nn

from ...ops.flow import euler, mean_velocity
from ...ops.spectrum import high_energy
from ..networks import Networks, velocity
from ..optim import OptimConfig
from ..rollouts import RolloutContext, sample_grid
from ..stages import StudentTask

TARGET_SCHEMES = {  # who goes how far on the way of k base steps
    "online": lambda k: [("previous", k - 1)] * (k > 1) + [("teacher", 1)],
    "halving": lambda k: [("previous", k // 2), ("previous", k - k // 2)] if k > 1 else [("teacher", 1)],
    "direct": lambda k: [("teacher", 1)] * k,
}


class GpdConfig(BaseModel, frozen=True, extra="forbid"):
    """What a distillation does, apart from its optimizer."""

    base_steps: int = Field(48, ge=1)
    horizons: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 7, 8)
    target_scheme: Literal["online", "halving", "direct"] = "online"
    guidance_start: float = Field(4.0, ge=1)
    guidance_end: float = Field(4.0, ge=1)
    guidance_anneal: Literal["none", "stage", "iteration"] = "none"
    trajectories: int = Field(16, ge=1)  # trajectories that are carried, over all processes
    advance: Literal["target", "student"] = "target"
    off_grid: float = Field(0.25, ge=0, le=1)  # share of the jumps that stop where the last piece begins
    max_stride: int = Field(
        16, ge=1
    )  # most base steps a slot moves on in one iteration: short stages see more prompts so
    spatial_weight: float = Field(0.0, ge=0)  # weight of high spatial frequencies in the last stage
    temporal_weight: float = Field(0.0, ge=0)  # of high temporal ones

    def guidance(self, stage: int, share: float) -> float:
        """The teacher's guidance at a share of the iterations of a stage (counted from 0)."""
        count = len(self.horizons)
        done = {"none": 0.0, "stage": stage / max(1, count - 1), "iteration": min(1.0, (stage + share) / count)}
        return self.guidance_start + (self.guidance_end - self.guidance_start) * done[self.guidance_anneal]


class GpdTask(StudentTask):
    """A stage at a time; a process carries the slots first .. first + count of all."""

    def __init__(
        self,
        optim: OptimConfig,
        config: GpdConfig,
        nets: Networks,
        context: RolloutContext,
        share: tuple[int, int] = (0, 1),
    ):
        """`share`: which process this is, of how many."""
        super().__init__(optim, nets, context, config.trajectories, share)
        self.config = config

    @property
    def horizon(self) -> int:
        """Base steps that a call of this stage goes."""
        return self.config.horizons[self.stage]

    @property
    def stages(self) -> dict[str, int]:
        """Names of the stages, and the horizons that their students are looked at with."""
        return {f"k{k}": k for k in self.config.horizons}

    @property
    def best(self) -> bool:
        """Whether the best student seen is the one to keep: not if what is looked at is not what is taught."""
        return self.config.guidance_anneal == "none"

    diverged = False  # by itself; what is looked at tells

    @property
    def last(self) -> bool:
        """Whether this is the last stage."""
        return self.stage == len(self.config.horizons) - 1

    def loss(self, model: nn.Module, step: int, seed: int) -> tuple[Tensor, dict[str, float]]:
        """The student's error at the slots, which then move on."""
        trajectories, device = self.trajectories, self.trajectories.x.device
        guidance = self.config.guidance(self.stage, step / self.optim.steps)
        target, stops, calls = self.way(trajectories.x, trajectories.index, trajectories.words, guidance)
        v = velocity(
            model, trajectories.x, self.context.tell(trajectories.index, stops[-1]).to(device), trajectories.words
        )
        error, logs = v - target, {"calls": calls, "guidance": guidance}
        loss = error.square().mean()
        if self.last and (self.config.spatial_weight or self.config.temporal_weight):
            logs["space"], logs["time"] = high_energy(error)
            loss = loss + self.config.spatial_weight * logs["space"] + self.config.temporal_weight * logs["time"]
        self._move(target if self.config.advance == "target" else v.detach(), stops, step)
        return loss, {name: float(torch.as_tensor(value).detach()) for name, value in logs.items()}

    def way(self, x: Tensor, index: Tensor, words: Tensor, guidance: float) -> tuple[Tensor, list[Tensor], int]:
        """Mean velocity (s, c, f, h, w) of a jump from base steps `index` (s,); where its pieces end; calls it took.

        Where fewer base steps are left than the horizon has, the first pieces are cut short.
        """
        pieces, n = TARGET_SCHEMES[self.config.target_scheme](self.horizon), self.config.base_steps
        at, velocities, stops, calls = index, [], [index], 0
        for place, (who, _) in enumerate(pieces):
            far = sum(length for _, length in pieces[: place + 1])
            later = sum(length for _, length in pieces[place + 1 :])
            stop = torch.maximum(index, torch.minimum(index + far, n - torch.tensor(later)))
            t = self.context.times[at.clamp(max=n - 1)].to(x.device)
            if who == "teacher":
                v = self.nets.teacher(x, t, words, self.empty, guidance)
            else:
                v = self.nets.previous(x, t, words)
            calls += 1 + (who == "teacher" and guidance != 1)
            x = euler(x, v, self.context.levels[at], self.context.levels[stop])
            velocities.append(v)
            stops.append(stop)
            at = stop
        return mean_velocity(velocities, [self.context.levels[s] for s in stops]), stops, calls

    def _move(self, v: Tensor, stops: list[Tensor], step: int) -> None:
        """Carry the slots to the end of their jump or beyond; some stop a piece earlier: all phases are visited.

        In the last stage none does either, unless its horizon is 1: a slot that began in it is on the student's grid.
        """
        trajectories, n = self.trajectories, self.config.base_steps
        end = stops[-1].clone()
        for i, number in enumerate(() if self.last and self.horizon > 1 else self._own()):
            rng = random.Random(f"{self.optim.seed} {self.stage} {step} {number}")
            early = rng.random() < self.config.off_grid
            far = rng.randint(0, max(0, self.config.max_stride - self.horizon))
            end[i] = stops[-2][i] if early and stops[-2][i] > trajectories.index[i] else min(n, int(end[i]) + far)
        trajectories.move(v, end)

    def _own(self) -> range:
        """The numbers of this process's slots among all."""
        return range(self.trajectories.first, self.trajectories.first + len(self.trajectories))

    def spread_timesteps(self) -> None:
        """Let the guided teacher carry each slot to a base step of its own."""

        def guided(now: Tensor) -> Tensor:
            at, guidance = self.context.times[now].to(self.trajectories.x.device), self.config.guidance(0, 0)
            return self.nets.teacher(self.trajectories.x, at, self.trajectories.words, self.empty, guidance)

        self.trajectories.spread_timesteps(guided, self.config.max_stride)

    def sample_grid(self, path: Path) -> None:
        """Four prompts, from noise to the end in the student's own steps."""
        sample_grid(self.module, self.context, self.horizon, path)
