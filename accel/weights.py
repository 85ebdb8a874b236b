"""Weights that take a module's place for a while, and telling whether they were made for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn


def marks(module: nn.Module) -> list[float]:
    """One weight of each parameter, in their order: tells models of one architecture apart, in any dtype."""
    return [float(f"{p.detach().flatten()[p.numel() // 2].item():.4g}") for p in module.parameters()]


def bears(module: nn.Module, known: list[float]) -> bool:
    """Whether a module has these `marks`, up to the rounding of half precision."""
    own = marks(module)
    return len(own) == len(known) and torch.allclose(torch.tensor(own), torch.tensor(known), rtol=0.01, atol=1e-4)


@contextmanager
def replaced(module: nn.Module, file: Path) -> Iterator[None]:
    """Inside, the parameters hold the tensors of a safetensors file; afterwards, bitwise, what they held before.

    Raises ValueError if the file has other names or shapes.
    """
    own, other = dict(module.named_parameters()), load_file(file)
    if {k: v.shape for k, v in own.items()} != {k: v.shape for k, v in other.items()}:
        raise ValueError(f"{file.name} in {file.parent.name} holds weights of another architecture")
    before = {name: p.data for name, p in own.items()}
    for name, p in own.items():
        p.data = other[name].to(p.device, p.dtype)
    try:
        yield
    finally:
        for name, p in own.items():
            p.data = before[name]
