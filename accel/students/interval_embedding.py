"""Interval-end and guidance embeddings for MeanFlow students.

Wan's transformer uses its timestep only in its `condition_embedder`. A wrapper around that embedder takes three numbers
for each sample in place of the timestep, so the transformer itself stays as it is. Before training, the output is
bitwise that of the stock embedder.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from safetensors.torch import save_file
from torch import Tensor, nn

from .weights import load_weights

INTERVAL_EMBEDDER = "interval_embedder.safetensors"
# Radians of the fastest sinusoid per unit of the embedded number (1000 t, 1000 r or 1000 x guidance). The stock
# embedding's 1 makes the derivative of a small network in t so steep that training on it diverges.
MAX_FREQUENCY = {"end": 0.01, "guidance": 0.001}


def pack_timestep(t: Tensor, r: Tensor, guidance: Tensor) -> Tensor:
    """The packed timestep (3b,) of intervals from t (b,) to r (b,), in sigmas, at a guidance (b,)."""
    return 1000 * torch.cat([t, r, guidance])


class ScalarEmbedding(nn.Module):
    """Maps a number (b,) to an addition to the time embedding (b, d), which is zero before training."""

    def __init__(self, frequencies: int, width: int, max_frequency: float):
        super().__init__()
        self.sinusoids = Timesteps(frequencies, flip_sin_to_cos=True, downscale_freq_shift=0, scale=max_frequency)
        self.mlp = TimestepEmbedding(frequencies, width)
        nn.init.zeros_(self.mlp.linear_2.weight)
        nn.init.zeros_(self.mlp.linear_2.bias)

    def forward(self, value: Tensor) -> Tensor:
        return self.mlp(self.sinusoids(value).to(self.mlp.linear_1.weight.dtype))


class IntervalEmbedder(nn.Module):
    """A `condition_embedder` that also takes packed timesteps (3b,). For stock ones (b,) it is the one it wraps."""

    def __init__(self, base: nn.Module):
        super().__init__()
        self.base = base
        first, width = base.time_embedder.linear_1, base.time_embedder.linear_2.out_features
        scalars = {name: ScalarEmbedding(first.in_features, width, fastest) for name, fastest in MAX_FREQUENCY.items()}
        self.scalars = nn.ModuleDict(scalars).to(first.weight.device, torch.float32)

    def forward(self, timestep: Tensor, text: Tensor, image: Tensor | None = None, timestep_seq_len: int | None = None):
        if len(timestep) == len(text) or timestep_seq_len is not None:
            return self.base(timestep, text, image, timestep_seq_len=timestep_seq_len)
        t, r, guidance = timestep.chunk(3)
        here = next(self.scalars.parameters()).device
        if here.type != "meta" and here != timestep.device:  # offloading that was set up before does not know them
            self.scalars.to(timestep.device)
        base, additions = self.base, self.scalars["end"](r) + self.scalars["guidance"](guidance)
        sinusoids = base.timesteps_proj(t).to(next(base.time_embedder.parameters()).dtype)
        time = (base.time_embedder(sinusoids) + additions).type_as(text)
        image = None if image is None else base.image_embedder(image)
        return time, base.time_proj(base.act_fn(time)), base.text_embedder(text), image


@contextmanager
def with_interval_embedder(transformer: nn.Module, scalars: dict[str, Tensor]) -> Iterator[None]:
    """Inside the context, a Wan transformer takes packed timesteps; `scalars` are the weights of its embeddings."""
    stock = transformer.condition_embedder
    with torch.random.fork_rng(devices=()):  # initialisation must not touch the global random state
        transformer.condition_embedder = IntervalEmbedder(stock)
    try:
        load_weights(transformer.condition_embedder.scalars, scalars, INTERVAL_EMBEDDER)
        yield
    finally:
        transformer.condition_embedder = stock


@contextmanager
def unwrapped(transformer: nn.Module) -> Iterator[None]:
    """Inside the context, the embedder is the stock one, so its weights have their stock names."""
    embedder = transformer.condition_embedder
    transformer.condition_embedder = getattr(embedder, "base", embedder)
    try:
        yield
    finally:
        transformer.condition_embedder = embedder


def save_interval_embedder(transformer: nn.Module, folder: Path) -> None:
    """Save the embeddings of a wrapped embedder; do nothing for a stock one."""
    if isinstance(transformer.condition_embedder, IntervalEmbedder):
        scalars = transformer.condition_embedder.scalars.state_dict()
        tensors = {name: weight.detach().cpu().contiguous() for name, weight in scalars.items()}
        save_file(tensors, folder / INTERVAL_EMBEDDER)
