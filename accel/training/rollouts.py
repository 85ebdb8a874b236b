"""Rollouts: trajectories from noise to video latents that a distillation advances from iteration to iteration.

Letters: s trajectories of this process, b batch, c channels, f frames, h w latent height and width, n tokens, d width,
N base steps. A base step is an index 0..N into the base schedule.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import imageio.v3 as iio
import torch
from accelerate import PartialState
from einops import rearrange
from torch import Tensor, nn
from tqdm import tqdm

from ..errors import AccelError
from ..ops.flow import euler
from ..runtime.generate import latent_spec
from ..runtime.latents import denormalize
from ..runtime.models import ModelDefaults
from ..runtime.run import build_run
from ..students.interval_embedding import pack_timestep
from .networks import velocity
from .tasks.vae import from_unit


@dataclass(frozen=True)
class RolloutContext:
    """What a rollout needs of a pipeline: text encoder, prompts, base schedule and latent shape."""

    encode: Callable[[list[str]], Tensor]  # embeddings (b, n, d)
    draw_prompt: Callable[[random.Random], str]
    sigmas: Tensor  # (N + 1,) float64, from 1 to 0
    timesteps: Tensor  # (N,) as the model takes them
    shape: tuple[int, ...]  # (c, f, h, w)
    decode: Callable[[Tensor], Tensor] | None = None  # latents (b, c, f, h, w) to frames (b, 3, f, h, w) in [-1, 1]
    draw_video: Callable[[random.Random], tuple[str, Tensor]] | None = None  # a prompt and latents (c, f, h, w)

    def timestep(self, start: Tensor, end: Tensor) -> Tensor:
        """The student's timestep input for jumps between base steps (b,): here the timestep of the start."""
        return self.timesteps[start.clamp(max=len(self.timesteps) - 1)]

    def batch_timestep(self, x: Tensor, i: int, j: int) -> Tensor:
        """The same for a batch x (b, ...) that jumps from base step i to base step j, on the device of x."""
        return self.timestep(*(torch.full((len(x),), step) for step in (i, j))).to(x.device)

    def step(self, x: Tensor, v: Tensor, i: int, j: int) -> Tensor:
        """A batch x (b, ...) after one Euler step from base step i to base step j."""
        return euler(x, v, *(self.sigmas[step].expand(len(x)) for step in (i, j)))


@dataclass(frozen=True)
class MeanFlowContext(RolloutContext):
    """A rollout whose student is given the start and end of a jump and the guidance; `guidance_only`: no end."""

    guidance: float = 1.0
    guidance_only: bool = False

    def timestep(self, start: Tensor, end: Tensor) -> Tensor:
        guidance = torch.full((len(start),), self.guidance)
        end = start if self.guidance_only else end
        return pack_timestep(self.sigmas[start].float(), self.sigmas[end].float(), guidance)


def rollout_context(
    pipe, defaults: ModelDefaults, base_steps: int, draw_prompt: Callable[[random.Random], str]
) -> RolloutContext:
    """The context of a pipeline at its default size; its scheduler gives sigmas and timesteps."""
    device = pipe.transformer.device
    pipe.scheduler.set_timesteps(base_steps)

    @torch.no_grad()
    def encode(texts: list[str]) -> Tensor:
        options = dict(do_classifier_free_guidance=False, max_sequence_length=defaults.text_length, device=device)
        return pipe.encode_prompt(texts, **options)[0].float()

    shape = tuple(latent_spec(build_run(defaults, model="", prompt="-"), pipe).shape[1:])
    sigmas, timesteps = pipe.scheduler.sigmas.double().cpu(), pipe.scheduler.timesteps.cpu()
    decode = lambda z: pipe.vae.decode(denormalize(pipe.vae, z).to(pipe.vae.dtype)).sample.float()
    return RolloutContext(encode, draw_prompt, sigmas, timesteps, shape, decode)


def progress(steps: int, title: str) -> Iterable[int]:
    """The steps of one of the rollouts before the first iteration, which take minutes on a CPU, with a bar."""
    return tqdm(range(steps), desc=title, disable=not PartialState().is_main_process, leave=False)


def rollout(model: nn.Module, context: RolloutContext, x: Tensor, text: Tensor, k: int) -> Tensor:
    """Final latents (b, c, f, h, w) that a student makes of noise x (b, c, f, h, w) in jumps of k base steps."""
    n = len(context.timesteps)
    for i in range(0, n, k):
        j = min(i + k, n)
        x = context.step(x, velocity(model, x, context.batch_timestep(x, i, j), text), i, j)
    return x


@torch.no_grad()
def sample_grid(model: nn.Module, context: RolloutContext, k: int, path: Path) -> None:
    """Write an image: nine frames of each of four prompts, rolled out in jumps of k; nothing without a decoder."""
    if context.decode is None:
        return
    rng = random.Random("sample grid")
    text = context.encode([context.draw_prompt(rng) for _ in range(4)])
    x = torch.randn(4, *context.shape, generator=torch.Generator().manual_seed(0)).to(text.device)
    frames = context.decode(rollout(model, context, x, text, k))
    frames = frames[:, :, :: max(1, frames.shape[2] // 8)]
    iio.imwrite(path, from_unit(rearrange(frames, "b c f h w -> c 1 (b h) (f w)"))[0].cpu().numpy())


class TrajectoryPool:
    """The trajectories of one process: latents x (s, c, f, h, w), base step `index` (s,), embeddings `text` (s, n, d).

    A trajectory that reaches the end restarts with new noise and a new prompt; `episode` (s,) counts its restarts. It
    starts in noise, or, where the context has videos, at a random base step on the line between noise and a video.
    All random choices depend on the seed, the trajectory's number and its episode alone, so that they are the same
    however many processes share the pool.
    """

    def __init__(self, context: RolloutContext, total: int, rank_and_world: tuple[int, int], seed: int):
        """`total` counts the trajectories of all processes. Raises AccelError if they cannot be shared equally."""
        rank, world = rank_and_world
        if total % world:
            raise AccelError(
                f"{total} trajectories cannot be shared by {world} processes: start a number that divides it"
            )
        count = total // world
        self.context, self.first, self.seed = context, rank * count, seed
        empty = context.encode([""])
        self.text, zero = empty.expand(count, -1, -1).clone(), torch.zeros(count, dtype=torch.long)
        self.x = torch.empty(count, *context.shape, device=empty.device)
        self.index, self.episode = zero.clone(), zero - 1
        self._restart(torch.ones(count, dtype=torch.bool))

    def __len__(self) -> int:
        return len(self.index)

    @property
    def numbers(self) -> range:
        """The numbers of this process's trajectories among all."""
        return range(self.first, self.first + len(self))

    def rngs(self, *purpose) -> list[random.Random]:
        """One random generator per trajectory and episode; the same purpose gives the same numbers."""
        seed = f"{self.seed} {' '.join(map(str, purpose))}"
        return [random.Random(f"{seed} {i} {episode}") for i, episode in zip(self.numbers, self.episode.tolist())]

    def uniform(self, low: float, high: float, *purpose) -> Tensor:
        """One number between two bounds per trajectory, (s,)."""
        return torch.tensor([low + (high - low) * rng.random() for rng in self.rngs(*purpose)])

    def move(self, v: Tensor, end: Tensor) -> None:
        """Take an Euler step along velocities v (s, c, f, h, w) to the base steps `end` (s,)."""
        self.x = euler(self.x, v, self.context.sigmas[self.index], self.context.sigmas[end])
        self.index = end
        self._restart(end >= len(self.context.timesteps))

    @torch.no_grad()
    def spread_timesteps(self, velocity: Callable[[Tensor], Tensor], max_stride: int) -> None:
        """Move each trajectory to a random base step, so that a batch covers all noise levels.

        `velocity` maps base steps (s,) to velocities; one move covers at most `max_stride` base steps.
        """
        n = len(self.context.timesteps)
        goal = torch.tensor([random.Random(f"{self.seed} {i}").randrange(n) for i in self.numbers])
        goal = torch.maximum(goal, self.index)  # a trajectory that starts at a video may be further already
        furthest = int((goal - self.index).max())
        for _ in progress(math.ceil(furthest / max_stride), "trajectories"):
            # always the full batch, which is the shape that compiled blocks know
            start, end = self.index, torch.minimum(goal, self.index + max_stride)
            self.x = euler(self.x, velocity(start), self.context.sigmas[start], self.context.sigmas[end])
            self.index = end

    def _restart(self, finished: Tensor) -> None:
        prompts: dict[int, str] = {}
        for i in finished.nonzero().flatten().tolist():
            self.episode[i] += 1
            rng = random.Random(f"{self.seed} {self.first + i} {int(self.episode[i])}")
            noise = torch.Generator().manual_seed(rng.getrandbits(62))
            self.x[i] = torch.randn(self.context.shape, generator=noise).to(self.x)
            self.index[i], prompt = 0, None
            if self.context.draw_video:
                self.index[i] = rng.randrange(len(self.context.timesteps))
                prompt, video = self.context.draw_video(rng)
                self.x[i].lerp_(video.to(self.x), 1 - float(self.context.sigmas[self.index[i]]))
            prompts[i] = prompt or self.context.draw_prompt(rng)
        if prompts:
            self.text = self.text.clone()  # a loss that is still to be differentiated may hold the old one
            self.text[list(prompts)] = self.context.encode(list(prompts.values()))

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors (s, ...) that a resumed run needs; those of all processes are concatenated."""
        return {name: getattr(self, name) for name in ("x", "index", "episode", "text")}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take this process's rows of the tensors of all processes."""
        own = slice(self.first, self.first + len(self))
        for name, current in self.state_dict().items():
            setattr(self, name, state[name][own].to(current.device))
