"""Counts the FLOPs of a transformer call without running it: a copy on the meta device under torch's FLOP counter."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from diffusers.models.attention_dispatch import attention_backend
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import FlopCounterMode

from .trace import DENOISER

_COUNTED: dict[tuple, dict[str, int]] = {}


def count_flops(
    model: nn.Module, x: Tensor, inputs: dict[str, Any], call: Callable[[], Any] | None = None
) -> dict[str, int]:
    """FLOPs of one call on latents x with these inputs: of the full call under "denoiser", and by module name.

    Counted once per architecture and shapes, without running the model; where its operations depend on values (such as
    a mask), by `call`, which runs it once. A multiply-add counts as two; element-wise operations are not counted.
    """
    inputs = {"hidden_states": x, **inputs}
    shapes = tree_map(lambda v: tuple(v.shape) if isinstance(v, Tensor) else v, inputs)
    key = (type(model), str(sorted(dict(model.config).items(), key=str)), str(sorted(shapes.items())))
    if key not in _COUNTED:
        try:
            _COUNTED[key] = _count(_meta_call(model, inputs))
        except (NotImplementedError, RuntimeError):
            if call is None:
                raise
            _COUNTED[key] = _count(call)
    return _COUNTED[key]


def _meta_call(model: nn.Module, inputs: dict[str, Any]) -> Callable[[], Any]:
    """A call of a copy of the model on the meta device."""
    with torch.device("meta"):
        copy = type(model).from_config(model.config)
        zeros = lambda v: torch.zeros(v.shape, dtype=None if v.is_floating_point() else v.dtype)
        inputs = tree_map(lambda v: zeros(v) if isinstance(v, Tensor) else v, inputs)
    return lambda: copy(**inputs)


def _count(call: Callable[[], Any]) -> dict[str, int]:
    with FlopCounterMode(display=False) as counter, torch.no_grad(), attention_backend("native"):
        call()
    total: dict[str, int] = defaultdict(int)
    for name, ops in counter.get_flop_counts().items():
        if name != "Global":
            total[name.partition(".")[2] or DENOISER] = sum(ops.values())
    return dict(total)
