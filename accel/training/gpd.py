"""Guided progressive distillation (arXiv 2602.01814): 48 guided steps into 6, one base step of horizon at a time.

Stage k teaches one call to go k base steps. Its target is made on the way: the frozen student of stage k - 1 goes
k - 1 steps in one call, the frozen guided teacher does the last one, and the mean velocity of both is learnt. So an
iteration costs the same in every stage, and guidance enters once per base step and is built in. Data-free: captions
and noise. The rivals (halving, direct) are other ways to the same end of a jump.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import imageio.v3 as iio
import torch
from einops import rearrange
from pydantic import BaseModel, Field
from torch import Tensor, nn

from ..flow import euler, mean_velocity
from ..models import Home
from ..run import build_run, latents
from ..spectrum import high_energy
from .fit import Recipe
from .students import Networks, velocity
from .vae import from_unit, raw

PIECES = {  # who goes how far on the way of k base steps
    "online": lambda k: [("previous", k - 1)] * (k > 1) + [("teacher", 1)],
    "halving": lambda k: [("previous", k // 2), ("previous", k - k // 2)] if k > 1 else [("teacher", 1)],
    "direct": lambda k: [("teacher", 1)] * k,
}


class Curriculum(BaseModel, frozen=True, extra="forbid"):
    """What a distillation does, apart from its optimizer."""

    base_steps: int = Field(48, ge=1)
    horizons: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 7, 8)
    way: Literal["online", "halving", "direct"] = "online"
    guidance_start: float = Field(4.0, ge=1)
    guidance_end: float = Field(4.0, ge=1)
    guidance_anneal: Literal["none", "stage", "iteration"] = "none"
    slots: int = Field(16, ge=1)  # trajectories that are carried, over all processes
    advance: Literal["target", "student"] = "target"
    off_grid: float = Field(0.25, ge=0, le=1)  # share of the jumps that stop where the last piece begins
    hop: int = Field(16, ge=1)  # most base steps a slot moves on in one iteration: short stages see more prompts so
    space: float = Field(0.0, ge=0)  # weight of high spatial frequencies in the last stage
    time: float = Field(0.0, ge=0)  # of high temporal ones

    def guidance(self, stage: int, share: float) -> float:
        """The teacher's guidance at a share of the iterations of a stage (counted from 0)."""
        last = max(1, len(self.horizons) - 1)
        done = {"none": 0.0, "stage": stage / last, "iteration": min(1.0, (stage + share) / (last + 1))}
        return self.guidance_start + (self.guidance_end - self.guidance_start) * done[self.guidance_anneal]


@dataclass(frozen=True)
class Ground:
    """Where trajectories run: text, captions to draw, the base grid as the scheduler emits it, the latents' shape."""

    encode: Callable[[list[str]], Tensor]  # embeddings (b, n, d)
    prompts: Callable[[random.Random], str]
    levels: Tensor  # (N + 1,) float64, from 1 to 0
    times: Tensor  # (N,) timesteps
    shape: tuple[int, ...]  # (c, f, h, w)
    decode: Callable[[Tensor], Tensor] | None = None  # latents (b, c, f, h, w) to frames (b, 3, f, h, w) in [-1, 1]


def ground_of(pipe, home: Home, base_steps: int, prompts: Callable[[random.Random], str]) -> Ground:
    """The ground of a pipeline at its home size; its scheduler gives the levels and timesteps."""
    device = pipe.transformer.device
    pipe.scheduler.set_timesteps(base_steps)

    @torch.no_grad()
    def encode(texts: list[str]) -> Tensor:
        given = dict(do_classifier_free_guidance=False, max_sequence_length=home.text_length, device=device)
        return pipe.encode_prompt(texts, **given)[0].float()

    shape = tuple(latents(build_run(home, model="", prompt="-"), pipe).shape[1:])
    levels, times = pipe.scheduler.sigmas.double().cpu(), pipe.scheduler.timesteps.cpu()
    decode = lambda z: pipe.vae.decode(raw(pipe.vae, z).to(pipe.vae.dtype)).sample.float()
    return Ground(encode, prompts, levels, times, shape, decode)


def walk(model: nn.Module, ground: Ground, x: Tensor, words: Tensor, k: int) -> Tensor:
    """Noise x (b, c, f, h, w) carried to the end by a student in its own jumps of k base steps."""
    n = len(ground.times)
    for i in range(0, n, k):
        now, then = (ground.levels[j].expand(len(x)) for j in (i, min(i + k, n)))
        x = euler(x, velocity(model, x, ground.times[i].expand(len(x)).to(x.device), words), now, then)
    return x


@dataclass
class Slots:
    """Trajectories under way: latents x (s, c, f, h, w), place on the base grid, and which trajectory of its slot."""

    x: Tensor
    index: Tensor  # (s,)
    visit: Tensor  # (s,)
    words: Tensor  # (s, n, d)


class GpdTask:
    """A stage at a time; a process carries the slots first .. first + count of all."""

    def __init__(
        self, recipe: Recipe, curriculum: Curriculum, nets: Networks, ground: Ground, share: tuple[int, int] = (0, 1)
    ):
        """`share`: which process this is, of how many."""
        self.recipe, self.curriculum, self.nets, self.ground = recipe, curriculum, nets, ground
        if curriculum.slots % share[1]:
            raise ValueError(f"{curriculum.slots} slots cannot be shared by {share[1]} processes: give --slots")
        count = curriculum.slots // share[1]
        self.first, self.stage = share[0] * count, 0
        self.empty = ground.encode([""])
        words, zero = self.empty.expand(count, -1, -1).clone(), torch.zeros(count, dtype=torch.long)
        self.slots = Slots(torch.empty(count, *ground.shape, device=words.device), zero.clone(), zero - 1, words)
        self._restart(torch.ones(count, dtype=torch.bool))

    @property
    def module(self) -> nn.Module:
        return self.nets.module

    @property
    def horizon(self) -> int:
        return self.curriculum.horizons[self.stage]

    @property
    def last(self) -> bool:
        return self.stage == len(self.curriculum.horizons) - 1

    def matrices(self) -> list[nn.Parameter]:
        return self.nets.matrices()

    def loss(self, model: nn.Module, step: int, seed: int) -> tuple[Tensor, dict[str, float]]:
        """The student's error at the slots, which then move on."""
        slots, device = self.slots, self.slots.x.device
        guidance = self.curriculum.guidance(self.stage, step / self.recipe.steps)
        target, stops, calls = self.way(slots.x, slots.index, slots.words, guidance)
        v = velocity(model, slots.x, self.ground.times[slots.index].to(device), slots.words)
        error, logs = v - target, {"calls": calls, "guidance": guidance}
        loss = error.square().mean()
        if self.last and (self.curriculum.space or self.curriculum.time):
            logs["space"], logs["time"] = high_energy(error)
            loss = loss + self.curriculum.space * logs["space"] + self.curriculum.time * logs["time"]
        self._move(target if self.curriculum.advance == "target" else v.detach(), stops, step)
        return loss, {name: float(torch.as_tensor(value).detach()) for name, value in logs.items()}

    def way(self, x: Tensor, index: Tensor, words: Tensor, guidance: float) -> tuple[Tensor, list[Tensor], int]:
        """Mean velocity (s, c, f, h, w) of a jump from base steps `index` (s,); where its pieces end; calls it took.

        Where fewer base steps are left than the horizon has, the first pieces are cut short.
        """
        pieces, n = PIECES[self.curriculum.way](self.horizon), self.curriculum.base_steps
        at, velocities, stops, calls = index, [], [index], 0
        for place, (who, _) in enumerate(pieces):
            far = sum(length for _, length in pieces[: place + 1])
            later = sum(length for _, length in pieces[place + 1 :])
            stop = torch.maximum(index, torch.minimum(index + far, n - torch.tensor(later)))
            t = self.ground.times[at.clamp(max=n - 1)].to(x.device)
            if who == "teacher":
                v = self.nets.teacher(x, t, words, self.empty, guidance)
            else:
                v = self.nets.previous(x, t, words)
            calls += 1 + (who == "teacher" and guidance != 1)
            x = euler(x, v, self.ground.levels[at], self.ground.levels[stop])
            velocities.append(v)
            stops.append(stop)
            at = stop
        return mean_velocity(velocities, [self.ground.levels[s] for s in stops]), stops, calls

    def _move(self, v: Tensor, stops: list[Tensor], step: int) -> None:
        """Carry the slots to the end of their jump or beyond; some stop a piece earlier: all phases are visited.

        In the last stage none does either, unless its horizon is 1: it stays on the grid of the finished student.
        """
        slots, n = self.slots, self.curriculum.base_steps
        end = stops[-1].clone()
        for i, number in enumerate(() if self.last and self.horizon > 1 else self._own()):
            rng = random.Random(f"{self.recipe.seed} {self.stage} {step} {number}")
            early = rng.random() < self.curriculum.off_grid
            far = rng.randint(0, max(0, self.curriculum.hop - self.horizon))
            end[i] = stops[-2][i] if early and stops[-2][i] > slots.index[i] else min(n, int(end[i]) + far)
        slots.x = euler(slots.x, v, self.ground.levels[slots.index], self.ground.levels[end])
        slots.index = end
        self._restart(end >= n)

    def _restart(self, over: Tensor) -> None:
        """New noise and a new prompt in the slots that are over; both depend on the slot and its visit alone."""
        slots = self.slots
        for i in over.nonzero().flatten().tolist():
            slots.visit[i] += 1
            name = f"{self.recipe.seed} {self.first + i} {int(slots.visit[i])}"
            rng = random.Random(name)
            noise = torch.Generator().manual_seed(rng.getrandbits(62))
            slots.x[i] = torch.randn(self.ground.shape, generator=noise).to(slots.x)
            slots.words[i] = self.ground.encode([self.ground.prompts(rng)])[0]
            slots.index[i] = 0

    def _own(self) -> range:
        """The numbers of this process's slots among all."""
        return range(self.first, self.first + len(self.slots.index))

    @torch.no_grad()
    def stagger(self) -> None:
        """Let the guided teacher carry each slot, in hops, to a base step of its own: a batch sees all levels."""
        slots, n = self.slots, self.curriculum.base_steps
        goal = torch.tensor(
            [random.Random(f"{self.recipe.seed} {self.first + i}").randrange(n) for i in range(len(slots.index))]
        )
        guidance = self.curriculum.guidance(0, 0)
        while (slots.index < goal).any():  # always the whole batch: a compiled network knows its shape
            now, then = slots.index, torch.minimum(goal, slots.index + self.curriculum.hop)
            at = self.ground.times[now].to(slots.x.device)
            v = self.nets.teacher(slots.x, at, slots.words, self.empty, guidance)
            slots.x, slots.index = euler(slots.x, v, self.ground.levels[now], self.ground.levels[then]), then

    @torch.no_grad()
    def sheet(self, path: Path) -> None:
        """Nine frames of each of four prompts, from noise to the end in the student's own steps."""
        if self.ground.decode is None:
            return
        rng = random.Random("sheet")
        words = self.ground.encode([self.ground.prompts(rng) for _ in range(4)])
        x = torch.randn(4, *self.ground.shape, generator=torch.Generator().manual_seed(0)).to(words.device)
        frames = self.ground.decode(walk(self.module, self.ground, x, words, self.horizon))
        frames = frames[:, :, :: max(1, frames.shape[2] // 8)]
        iio.imwrite(path, from_unit(rearrange(frames, "b c f h w -> c 1 (b h) (f w)"))[0].cpu().numpy())

    def state_dict(self) -> dict[str, Tensor]:
        """What a resumed run needs beside the weights; (s, ...) each, so that processes can be put together."""
        return vars(self.slots).copy()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """The inverse, from the slots of all processes."""
        own = slice(self.first, self.first + len(self.slots.index))
        device = self.slots.x.device
        self.slots = Slots(**{k: v[own].to(device if k in ("x", "words") else "cpu") for k, v in state.items()})
