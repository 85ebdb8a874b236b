"""The three networks of a distillation: a frozen guided teacher, the frozen student before, and the one that learns."""

from __future__ import annotations

from copy import deepcopy
from typing import Protocol

import torch
from torch import Tensor, nn


class Networks(Protocol):
    """Velocities (b, c, f, h, w) of latents x at timesteps t (b,) for text embeddings (b, n, d)."""

    module: nn.Module  # that learns

    def previous(self, x: Tensor, t: Tensor, words: Tensor) -> Tensor: ...
    def teacher(self, x: Tensor, t: Tensor, words: Tensor, empty: Tensor, guidance: float) -> Tensor: ...
    def next_stage(self) -> None: ...  # the student becomes the previous one


class Copies:
    """Three copies of a small transformer."""

    def __init__(self, transformer: nn.Module):
        self.module = deepcopy(transformer).train()
        self._teacher, self._previous = (deepcopy(transformer).eval().requires_grad_(False) for _ in range(2))

    @torch.no_grad()
    def previous(self, x: Tensor, t: Tensor, words: Tensor) -> Tensor:
        return velocity(self._previous, x, t, words)

    @torch.no_grad()
    def teacher(self, x: Tensor, t: Tensor, words: Tensor, empty: Tensor, guidance: float) -> Tensor:
        return guided(self._teacher, x, t, words, empty, guidance)

    def next_stage(self) -> None:
        self._previous.load_state_dict(self.module.state_dict())


def velocity(model: nn.Module, x: Tensor, t: Tensor, words: Tensor) -> Tensor:
    """One call of a transformer, its result in float32."""
    return model(x, t, words, return_dict=False)[0].float()


def guided(model: nn.Module, x: Tensor, t: Tensor, words: Tensor, empty: Tensor, guidance: float) -> Tensor:
    """Guided velocity as `WanPipeline` forms it: uncond + guidance (cond - uncond)."""
    cond = velocity(model, x, t, words)
    if guidance == 1:
        return cond
    uncond = velocity(model, x, t, empty.expand(len(x), -1, -1))
    return uncond + guidance * (cond - uncond)
