"""Guided progressive distillation (GPD, arXiv 2602.01814): from 48 guided steps to 6, in stages of growing horizon.

The student of horizon k makes k base steps in one call. Its target combines two pieces: the frozen student of horizon
k - 1 makes the first k - 1 base steps in one call, the frozen guided teacher makes the last one, and the mean velocity
of both is the target. An iteration therefore costs the same in every stage after the first, and the student takes in
the guidance one base step at a time. Training needs prompts and noise, but no videos. The ablations (halving, direct)
reach the end of a jump in other pieces.
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
from ..optimizer import OptimConfig
from ..rollouts import RolloutContext, sample_grid
from .student_task import StudentTask

TARGET_SCHEMES = {  # horizon k -> pieces of the target: who makes how many base steps in one call
    "online": lambda k: [("previous", k - 1)] * (k > 1) + [("teacher", 1)],
    "halving": lambda k: [("previous", k // 2), ("previous", k - k // 2)] if k > 1 else [("teacher", 1)],
    "direct": lambda k: [("teacher", 1)] * k,
}


class GpdConfig(BaseModel, frozen=True, extra="forbid"):
    """Settings of a distillation, apart from those of its optimizers."""

    base_steps: int = Field(48, ge=1)
    horizons: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 7, 8)
    target_scheme: Literal["online", "halving", "direct"] = "online"
    guidance_start: float = Field(4.0, ge=1)
    guidance_end: float = Field(4.0, ge=1)
    guidance_anneal: Literal["none", "stage"] = "none"
    trajectories: int = Field(16, ge=1)  # over all processes
    off_grid: float = Field(0.25, ge=0, le=1)  # fraction of the moves that end one piece early
    max_stride: int = Field(16, ge=1)  # most base steps per move: long moves show short horizons more prompts
    spatial_weight: float = Field(0.0, ge=0)  # loss weight of high spatial frequencies in the last stage
    temporal_weight: float = Field(0.0, ge=0)  # loss weight of high temporal frequencies in the last stage

    def guidance(self, stage: int) -> float:
        """The teacher's guidance in a stage, counted from 0."""
        done = stage / max(1, len(self.horizons) - 1) if self.guidance_anneal == "stage" else 0.0
        return self.guidance_start + (self.guidance_end - self.guidance_start) * done


class GpdTask(StudentTask):
    """Trains one stage at a time on this process's trajectories."""

    diverged = False  # only the validation error ends a stage

    def __init__(
        self, optim: OptimConfig, config: GpdConfig, nets: Networks, context: RolloutContext,
        rank_and_world: tuple[int, int] = (0, 1),
    ):  # fmt: skip
        super().__init__(optim, nets, context, config.trajectories, rank_and_world)
        self.config = config

    @property
    def horizon(self) -> int:
        """Base steps in one call of this stage's student."""
        return self.config.horizons[self.stage]

    @property
    def stages(self) -> dict[str, int]:
        """Names of the stages and the horizons of their students."""
        return {f"k{k}": k for k in self.config.horizons}

    @property
    def keep_best(self) -> bool:
        """Whether validation measures what is trained: it does not while the guidance is annealed."""
        return self.config.guidance_anneal == "none"

    @property
    def is_last(self) -> bool:
        """Whether this is the last stage."""
        return self.stage == len(self.config.horizons) - 1

    def loss(self, model: nn.Module, step: int, seed: int) -> tuple[Tensor, dict[str, float]]:
        """The student's squared error on all trajectories, which then move on."""
        pool, config = self.trajectories, self.config
        guidance = config.guidance(self.stage)
        target, stops, nfe = self.target(pool.x, pool.index, pool.text, guidance)
        t = self.context.timestep(pool.index, stops[-1]).to(pool.x.device)
        v = velocity(model, pool.x, t, pool.text)
        error, logs = v - target, {"nfe": nfe, "guidance": guidance}
        loss = error.square().mean()
        if self.is_last and (config.spatial_weight or config.temporal_weight):
            logs["spatial"], logs["temporal"] = high_energy(error)
            loss = loss + config.spatial_weight * logs["spatial"] + config.temporal_weight * logs["temporal"]
        self._move(target, stops, step)
        return loss, {name: float(torch.as_tensor(value).detach()) for name, value in logs.items()}

    def target(self, x: Tensor, index: Tensor, text: Tensor, guidance: float) -> tuple[Tensor, list[Tensor], int]:
        """Target velocity (s, c, f, h, w) of jumps from base steps `index` (s,), the ends of their pieces, and its NFE.

        Where fewer base steps remain than the horizon has, the first pieces become shorter.
        """
        pieces, n = TARGET_SCHEMES[self.config.target_scheme](self.horizon), self.config.base_steps
        at, velocities, stops, nfe = index, [], [index], 0
        for i, (network, _) in enumerate(pieces):
            covered = sum(length for _, length in pieces[: i + 1])
            remaining = sum(length for _, length in pieces[i + 1 :])
            stop = torch.maximum(index, torch.minimum(index + covered, n - torch.tensor(remaining)))
            t = self.context.timesteps[at.clamp(max=n - 1)].to(x.device)
            if network == "teacher":
                v = self.nets.teacher(x, t, text, self.empty, guidance)
            else:
                v = self.nets.previous(x, t, text)
            nfe += 1 + (network == "teacher" and guidance != 1)
            x = euler(x, v, self.context.sigmas[at], self.context.sigmas[stop])
            velocities.append(v)
            stops.append(stop)
            at = stop
        return mean_velocity(velocities, [self.context.sigmas[stop] for stop in stops]), stops, nfe

    def _move(self, v: Tensor, stops: list[Tensor], step: int) -> None:
        """Move the trajectories to the end of their jump or beyond; some stop one piece early, off the jump's grid.

        In the last stage all go to the student's grid and stay there, unless its horizon is 1.
        """
        pool, n, k = self.trajectories, self.config.base_steps, self.horizon
        if self.is_last and k > 1:
            return pool.move(v, ((pool.index // k + 1) * k).clamp(max=n))
        end = stops[-1].clone()
        for i, number in enumerate(pool.numbers):
            rng = random.Random(f"{self.optim.seed} {self.stage} {step} {number}")
            early = rng.random() < self.config.off_grid
            extra = rng.randint(0, max(0, self.config.max_stride - k))
            end[i] = stops[-2][i] if early and stops[-2][i] > pool.index[i] else min(n, int(end[i]) + extra)
        pool.move(v, end)

    def spread_timesteps(self) -> None:
        """Let the guided teacher move each trajectory to a random base step."""
        pool, guidance = self.trajectories, self.config.guidance(0)

        def guided(index: Tensor) -> Tensor:
            t = self.context.timesteps[index].to(pool.x.device)
            return self.nets.teacher(pool.x, t, pool.text, self.empty, guidance)

        pool.spread_timesteps(guided, self.config.max_stride)

    def sample_grid(self, path: Path) -> None:
        """Write an image of four prompts, rolled out in the student's own steps."""
        sample_grid(self.module, self.context, self.horizon, path)
