"""Holding a tensor until it is needed again: as computed, in 8 bits, or in the memory of the CPU."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

FP8 = torch.float8_e4m3fn


class Stored(NamedTuple):
    """A tensor in a cache format; `load` gives it back."""

    data: Tensor
    scale: Tensor | None  # (b, 1, ...) of the data in 8 bits
    dtype: torch.dtype
    device: torch.device

    @property
    def nbytes(self) -> int:
        """Bytes on the tensor's own device."""
        scale = 0 if self.scale is None else self.scale.nbytes
        return (self.data.nbytes if self.data.device == self.device else 0) + scale

    def load(self) -> Tensor:
        """The tensor in its own dtype and on its own device: with "fp8" rounded by up to 1/16, else the same bits."""
        # a pinned copy is read by the stream that wrote it, so neither has to wait
        x = self.data.to(self.device, self.dtype, non_blocking=True)
        return x if self.scale is None else x * self.scale


def store(x: Tensor, cache_format: str) -> Stored:
    """x (b, ...) in a cache format, one of FasterCache's.

    "model" is x itself, "fp8" float8_e4m3fn with a scale for each sample, and "cpu" a copy in CPU memory, pinned if x
    is on a CUDA device.
    """
    data, scale = x, None
    if cache_format == "fp8":
        largest = torch.linalg.vector_norm(x, torch.inf, tuple(range(1, x.ndim)), keepdim=True)
        scale = (largest / torch.finfo(FP8).max).clamp(min=torch.finfo(x.dtype).tiny)
        data = (x / scale).to(FP8)
    elif cache_format == "cpu":
        data = torch.empty_like(x, device="cpu", pin_memory=x.is_cuda).copy_(x, non_blocking=x.is_cuda)
    return Stored(data, scale, x.dtype, x.device)
