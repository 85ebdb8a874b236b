"""The three networks of a distillation: a frozen guided teacher, the frozen student before, and the one that learns."""

from __future__ import annotations

from contextlib import ExitStack
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from ..ops.flow import expand_like
from ..students.interval_embedding import save_interval_embedder, unwrapped
from ..students.weights import save_int8_delta
from .optimize import optimize_blocks


class Networks(Protocol):
    """Velocities (b, c, f, h, w) of latents x at timesteps t (b,) for text embeddings (b, n, d)."""

    module: nn.Module  # that learns

    def matrices(self) -> list[nn.Parameter]: ...  # of it, for Muon
    def previous(self, x: Tensor, t: Tensor, words: Tensor) -> Tensor: ...
    def teacher(self, x: Tensor, t: Tensor, words: Tensor, empty: Tensor, guidance: float | Tensor) -> Tensor: ...
    def next_stage(self) -> None: ...  # the student becomes the previous one
    def save(self, folder: Path) -> None: ...  # the student's weights, by their difference from the teacher's


class FullNetworks:
    """Three copies of a small transformer, quickened if a device is given."""

    def __init__(self, transformer: nn.Module, device: str | None = None):
        self.module = deepcopy(transformer).float().train()  # what is learnt would drown in half precision
        self._teacher, self._previous = (deepcopy(transformer).eval().requires_grad_(False) for _ in range(2))
        for net in (self.module, self._teacher, self._previous) if device else ():
            optimize_blocks(net.blocks, device)

    def matrices(self) -> list[nn.Parameter]:
        """Weights of the blocks that are matrices."""
        return [p for p in self.module.blocks.parameters() if p.ndim == 2]

    @torch.no_grad()
    def previous(self, x: Tensor, t: Tensor, words: Tensor) -> Tensor:
        """Velocity by the frozen student before."""
        return velocity(self._previous, x, t, words)

    @torch.no_grad()
    def teacher(self, x: Tensor, t: Tensor, words: Tensor, empty: Tensor, guidance: float | Tensor) -> Tensor:
        """Guided velocity by the frozen base."""
        return guided(self._teacher, x, t, words, empty, guidance)

    def next_stage(self) -> None:
        """The student becomes the one before."""
        self._previous.load_state_dict(self.module.state_dict())

    def save(self, folder: Path) -> None:
        """The student's differences from the base, a byte each."""
        with ExitStack() as stack:
            for net in (self.module, self._teacher):
                stack.enter_context(unwrapped(net))
            save_int8_delta(self.module, self._teacher, folder / "model.safetensors")
        save_interval_embedder(self.module, folder)


def velocity(model: nn.Module, x: Tensor, t: Tensor, words: Tensor, fine: bool = False) -> Tensor:
    """One call of a transformer in bfloat16 where that is safe; states and what comes back stay float32.

    `fine`: in the dtype of its own weights, for differences of calls that bfloat16 would drown; by the class's own
    forward, as accelerate puts its autocast around an instance's.
    """
    call = partial(type(model).forward, model) if fine else model
    with torch.autocast(
        x.device.type, torch.bfloat16, enabled=not fine or model.patch_embedding.weight.dtype != x.dtype
    ):
        return call(x, t, words, return_dict=False)[0].float()


def guided(model: nn.Module, x: Tensor, t: Tensor, words: Tensor, empty: Tensor, guidance: float | Tensor) -> Tensor:
    """Guided velocity as `WanPipeline` forms it: uncond + guidance (cond - uncond); a number, or one a sample (b,)."""
    cond = velocity(model, x, t, words)
    if isinstance(guidance, Tensor):
        guidance = expand_like(guidance, x)
    elif guidance == 1:
        return cond
    uncond = velocity(model, x, t, empty.expand(len(x), -1, -1))
    return uncond + guidance * (cond - uncond)
