"""The three networks of a distillation: guided teacher and previous student, both frozen, and the current student."""

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
from .fast_blocks import has_fast_bfloat16, optimize_blocks


class Networks(Protocol):
    """Velocities (b, c, f, h, w) of latents x at timesteps t (b,) for text embeddings (b, n, d)."""

    module: nn.Module  # the current student, which is trained

    def matrices(self) -> list[nn.Parameter]: ...  # parameters of the module that Muon trains
    def previous(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor: ...
    def teacher(self, x: Tensor, t: Tensor, text: Tensor, empty: Tensor, guidance: float | Tensor) -> Tensor: ...
    def next_stage(self) -> None: ...  # the current student becomes the previous one
    def save(self, folder: Path) -> None: ...  # the student's weights, as a difference from the teacher's


class FullNetworks:
    """Three copies of a small transformer, with fast blocks if a device is given."""

    def __init__(self, transformer: nn.Module, device: str | None = None):
        self.module = deepcopy(transformer).float().train()  # half precision would round small updates away
        self._teacher, self._previous = (deepcopy(transformer).eval().requires_grad_(False) for _ in range(2))
        for net in (self.module, self._teacher, self._previous) if device else ():
            optimize_blocks(net.blocks, device)

    def matrices(self) -> list[nn.Parameter]:
        """The two-dimensional parameters of the student's blocks."""
        return [p for p in self.module.blocks.parameters() if p.ndim == 2]

    @torch.no_grad()
    def previous(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        """Velocity of the frozen student of the previous stage."""
        return velocity(self._previous, x, t, text)

    @torch.no_grad()
    def teacher(self, x: Tensor, t: Tensor, text: Tensor, empty: Tensor, guidance: float | Tensor) -> Tensor:
        """Guided velocity of the frozen base model."""
        return guided(self._teacher, x, t, text, empty, guidance)

    def next_stage(self) -> None:
        """Make the current student the previous one."""
        self._previous.load_state_dict(self.module.state_dict())

    def save(self, folder: Path) -> None:
        """Save the student's difference from the base model in int8."""
        with ExitStack() as stack:
            for net in (self.module, self._teacher):
                stack.enter_context(unwrapped(net))
            save_int8_delta(self.module, self._teacher, folder / "model.safetensors")
        save_interval_embedder(self.module, folder)


def velocity(model: nn.Module, x: Tensor, t: Tensor, text: Tensor, full_precision: bool = False) -> Tensor:
    """Velocity (b, c, f, h, w) of one transformer call, in bfloat16 autocast where that is fast.

    x and the result stay float32. `full_precision` runs in the dtype of the model's weights, for differences between
    calls that bfloat16 would drown. It takes the forward of the class, because accelerate wraps that of the instance in
    an autocast.
    """
    call = partial(type(model).forward, model) if full_precision else model
    fast = not full_precision and has_fast_bfloat16(str(x.device))
    own = getattr(model, "module", model)  # of several processes, each has it wrapped
    autocast = fast or own.patch_embedding.weight.dtype != x.dtype
    with torch.autocast(x.device.type, torch.bfloat16, enabled=autocast):
        return call(x, t, text, return_dict=False)[0].float()


def guided(model: nn.Module, x: Tensor, t: Tensor, text: Tensor, empty: Tensor, guidance: float | Tensor) -> Tensor:
    """Guided velocity as in `WanPipeline`, uncond + guidance (cond - uncond); one guidance, or one per sample (b,)."""
    cond = velocity(model, x, t, text)
    if isinstance(guidance, Tensor):
        guidance = expand_like(guidance, x)
    elif guidance == 1:
        return cond
    uncond = velocity(model, x, t, empty.expand(len(x), -1, -1))
    return uncond + guidance * (cond - uncond)
