"""What a MeanFlow student is told besides the time: where its step ends, and the strength of the guidance within it.

Wan's transformer uses its timestep for one thing, its `condition_embedder`. A wrapper around that takes three numbers a
sample in the timestep's place, so the transformer itself stays as it is; at first it adds nothing, bitwise.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from safetensors.torch import save_file
from torch import Tensor, nn

INTERVAL_EMBEDDER = "interval_embedder.safetensors"
# Radians of the fastest sinusoid, per unit of what is told (1000 times a level, 1000 times a guidance). The stock
# embedding's 1 makes the derivative of a small network in its time so steep that training on it diverges.
MAX_FREQUENCY = {"end": 0.01, "guidance": 0.001}


def pack_timestep(now: Tensor, then: Tensor, guidance: Tensor) -> Tensor:
    """The timestep (3b,) of a jump from levels `now` (b,) to `then` (b,) at a guidance (b,)."""
    return 1000 * torch.cat([now, then, guidance])


class ScalarEmbedding(nn.Module):
    """A number as an addition to the time embedding (b, d); zero at first."""

    def __init__(self, frequencies: int, width: int, fastest: float):
        super().__init__()
        self.waves = Timesteps(frequencies, flip_sin_to_cos=True, downscale_freq_shift=0, scale=fastest)
        self.mlp = TimestepEmbedding(frequencies, width)
        nn.init.zeros_(self.mlp.linear_2.weight)
        nn.init.zeros_(self.mlp.linear_2.bias)

    def forward(self, value: Tensor) -> Tensor:
        return self.mlp(self.waves(value).to(self.mlp.linear_1.weight.dtype))


class IntervalEmbedder(nn.Module):
    """`condition_embedder` for a timestep that is `packed`; for a plain one (b,), just what it stands around."""

    def __init__(self, base: nn.Module):
        super().__init__()
        self.base = base
        first, width = base.time_embedder.linear_1, base.time_embedder.linear_2.out_features
        scalars = {name: ScalarEmbedding(first.in_features, width, fastest) for name, fastest in MAX_FREQUENCY.items()}
        self.scalars = nn.ModuleDict(scalars).to(first.weight.device, torch.float32)

    def forward(self, timestep: Tensor, text: Tensor, image: Tensor | None = None, timestep_seq_len: int | None = None):
        if len(timestep) == len(text) or timestep_seq_len is not None:
            return self.base(timestep, text, image, timestep_seq_len=timestep_seq_len)
        now, then, guidance = timestep.chunk(3)
        base, scalars = self.base, self.scalars["end"](then) + self.scalars["guidance"](guidance)
        waves = base.timesteps_proj(now).to(next(base.time_embedder.parameters()).dtype)
        time = (base.time_embedder(waves) + scalars).type_as(text)
        image = None if image is None else base.image_embedder(image)
        return time, base.time_proj(base.act_fn(time)), base.text_embedder(text), image


@contextmanager
def with_interval_embedder(transformer: nn.Module, scalars: dict[str, Tensor]) -> Iterator[None]:
    """Inside, a Wan transformer takes packed timesteps, with the weights of an `IntervalEmbedder`'s additions."""
    plain = transformer.condition_embedder
    with torch.random.fork_rng(devices=()):  # its first weights are not the caller's business
        transformer.condition_embedder = IntervalEmbedder(plain)
    transformer.condition_embedder.scalars.load_state_dict(scalars)
    try:
        yield
    finally:
        transformer.condition_embedder = plain


@contextmanager
def unwrapped(transformer: nn.Module) -> Iterator[None]:
    """Inside, the embedder is the stock one, and its weights have their stock names."""
    own = transformer.condition_embedder
    transformer.condition_embedder = getattr(own, "base", own)
    try:
        yield
    finally:
        transformer.condition_embedder = own


def save_interval_embedder(transformer: nn.Module, folder: Path) -> None:
    """The weights of a wrapped embedder's additions, as a file; nothing for a stock one."""
    if isinstance(transformer.condition_embedder, IntervalEmbedder):
        scalars = transformer.condition_embedder.scalars.state_dict()
        save_file(
            {name: weight.detach().cpu().contiguous() for name, weight in scalars.items()}, folder / INTERVAL_EMBEDDER
        )
