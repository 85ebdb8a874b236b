"""Trajectories that a distillation carries from iteration to iteration: noise and a prompt on their way to a video."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import imageio.v3 as iio
import torch
from einops import rearrange
from torch import Tensor, nn

from ..ops.flow import euler
from ..runtime.generate import build_run, latent_spec
from ..runtime.latents import denormalize
from ..runtime.models import ModelDefaults
from ..students.interval_embedding import pack_timestep
from .networks import velocity
from .tasks.vae import from_unit


@dataclass(frozen=True)
class RolloutContext:
    """Where trajectories run: text, captions to draw, the base grid as the scheduler emits it, the latents' shape."""

    encode: Callable[[list[str]], Tensor]  # embeddings (b, n, d)
    prompts: Callable[[random.Random], str]
    levels: Tensor  # (N + 1,) float64, from 1 to 0
    times: Tensor  # (N,) timesteps
    shape: tuple[int, ...]  # (c, f, h, w)
    decode: Callable[[Tensor], Tensor] | None = None  # latents (b, c, f, h, w) to frames (b, 3, f, h, w) in [-1, 1]
    clips: Callable[[random.Random], tuple[str, Tensor]] | None = None  # a prompt and its video's latents, if given

    def tell(self, now: Tensor, then: Tensor) -> Tensor:
        """What a student is told, as its timestep, of a jump between places (b,) of the grid: where it begins."""
        return self.times[now.clamp(max=len(self.times) - 1)]

    def told(self, x: Tensor, i: int, j: int) -> Tensor:
        """The same for a whole batch x (b, ...) that jumps from place i to place j, on its device."""
        return self.tell(*(torch.full((len(x),), place) for place in (i, j))).to(x.device)

    def jump(self, x: Tensor, v: Tensor, i: int, j: int) -> Tensor:
        """A whole batch x (b, ...) carried from place i to place j."""
        return euler(x, v, *(self.levels[place].expand(len(x)) for place in (i, j)))


@dataclass(frozen=True)
class MeanFlowContext(RolloutContext):
    """A ground whose students are told both ends of a jump, and a guidance; or an `instant` one, where it begins."""

    guidance: float = 1.0
    guidance_only: bool = False

    def tell(self, now: Tensor, then: Tensor) -> Tensor:
        w = torch.full((len(now),), self.guidance)
        return pack_timestep(*(self.levels[place].float() for place in (now, now if self.guidance_only else then)), w)


def rollout_context(
    pipe, defaults: ModelDefaults, base_steps: int, prompts: Callable[[random.Random], str]
) -> RolloutContext:
    """The ground of a pipeline at its home size; its scheduler gives the levels and timesteps."""
    device = pipe.transformer.device
    pipe.scheduler.set_timesteps(base_steps)

    @torch.no_grad()
    def encode(texts: list[str]) -> Tensor:
        given = dict(do_classifier_free_guidance=False, max_sequence_length=defaults.text_length, device=device)
        return pipe.encode_prompt(texts, **given)[0].float()

    shape = tuple(latent_spec(build_run(defaults, model="", prompt="-"), pipe).shape[1:])
    levels, times = pipe.scheduler.sigmas.double().cpu(), pipe.scheduler.timesteps.cpu()
    decode = lambda z: pipe.vae.decode(denormalize(pipe.vae, z).to(pipe.vae.dtype)).sample.float()
    return RolloutContext(encode, prompts, levels, times, shape, decode)


def rollout(model: nn.Module, context: RolloutContext, x: Tensor, words: Tensor, k: int) -> Tensor:
    """Noise x (b, c, f, h, w) carried to the end by a student in its own jumps of k base steps."""
    n = len(context.times)
    for i in range(0, n, k):
        j = min(i + k, n)
        x = context.jump(x, velocity(model, x, context.told(x, i, j), words), i, j)
    return x


@torch.no_grad()
def sample_grid(model: nn.Module, context: RolloutContext, k: int, path: Path) -> None:
    """Nine frames of each of four prompts, from noise to the end in jumps of k; nothing where frames cost too much."""
    if context.decode is None:
        return
    rng = random.Random("sheet")
    words = context.encode([context.prompts(rng) for _ in range(4)])
    x = torch.randn(4, *context.shape, generator=torch.Generator().manual_seed(0)).to(words.device)
    frames = context.decode(rollout(model, context, x, words, k))
    frames = frames[:, :, :: max(1, frames.shape[2] // 8)]
    iio.imwrite(path, from_unit(rearrange(frames, "b c f h w -> c 1 (b h) (f w)"))[0].cpu().numpy())


class TrajectoryPool:
    """Trajectories under way, a process's share of all; each begins anew, with other noise and words, at its end.

    It begins in noise, or, where there are clips, on the line between noise and one of these, at any place.
    Latents x (s, c, f, h, w), place `index` (s,) on the ground, the how-manieth of its slot (`visit`, from 0), text
    embeddings `words` (s, n, d). Noise and prompt depend on the seed, the slot and the visit alone.
    """

    def __init__(self, context: RolloutContext, whole: int, share: tuple[int, int], seed: int):
        """`whole`: how many there are over all processes; `share`: which process this is, of how many."""
        if whole % share[1]:
            raise ValueError(f"{whole} slots cannot be shared by {share[1]} processes: give --slots")
        count = whole // share[1]
        self.context, self.first, self.seed = context, share[0] * count, seed
        empty = context.encode([""])
        self.words, zero = empty.expand(count, -1, -1).clone(), torch.zeros(count, dtype=torch.long)
        self.x = torch.empty(count, *context.shape, device=empty.device)
        self.index, self.episode = zero.clone(), zero - 1
        self._restart(torch.ones(count, dtype=torch.bool))

    def __len__(self) -> int:
        return len(self.index)

    def rngs(self, *about) -> list[random.Random]:
        """Random numbers for each slot's trajectory, the same whenever the same is asked about it."""
        seed = f"{self.seed} {' '.join(map(str, about))}"
        return [random.Random(f"{seed} {self.first + i} {v}") for i, v in enumerate(self.episode.tolist())]

    def uniform(self, low: float, high: float, *about) -> Tensor:
        """One such number between two bounds for each slot."""
        return torch.tensor([low + (high - low) * rng.random() for rng in self.rngs(*about)])

    def move(self, v: Tensor, end: Tensor) -> None:
        """Carry each along its velocity to the place `end` (s,)."""
        self.x = euler(self.x, v, self.context.levels[self.index], self.context.levels[end])
        self.index = end
        self._restart(end >= len(self.context.times))

    @torch.no_grad()
    def spread_timesteps(self, velocity: Callable[[Tensor], Tensor], max_stride: int) -> None:
        """Carry each, by velocities at places (s,), in hops to a place of its own: a batch sees all levels."""
        n = len(self.context.times)
        goal = torch.tensor([random.Random(f"{self.seed} {self.first + i}").randrange(n) for i in range(len(self))])
        goal = torch.maximum(goal, self.index)  # on the line to a clip it may have begun behind
        while (self.index < goal).any():  # always the whole batch: a compiled network knows its shape
            now, then = self.index, torch.minimum(goal, self.index + max_stride)
            self.x = euler(self.x, velocity(now), self.context.levels[now], self.context.levels[then])
            self.index = then

    def _restart(self, over: Tensor) -> None:
        prompts: dict[int, str] = {}
        for i in over.nonzero().flatten().tolist():
            self.episode[i] += 1
            rng = random.Random(f"{self.seed} {self.first + i} {int(self.episode[i])}")
            noise = torch.Generator().manual_seed(rng.getrandbits(62))
            self.x[i] = torch.randn(self.context.shape, generator=noise).to(self.x)
            self.index[i], prompt = 0, None
            if self.context.clips:
                self.index[i] = rng.randrange(len(self.context.times))
                prompt, clip = self.context.clips(rng)
                self.x[i].lerp_(clip.to(self.x), 1 - float(self.context.levels[self.index[i]]))
            prompts[i] = prompt or self.context.prompts(rng)
        if prompts:
            self.words[list(prompts)] = self.context.encode(list(prompts.values()))

    def state_dict(self) -> dict[str, Tensor]:
        """What a resumed run needs; (s, ...) each, so that processes can be put together."""
        return {name: getattr(self, name) for name in ("x", "index", "episode", "words")}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """The inverse, from the slots of all processes."""
        own = slice(self.first, self.first + len(self))
        for name, now in self.state_dict().items():
            setattr(self, name, state[name][own].to(now.device))
