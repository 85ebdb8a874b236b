"""Counts the FLOPs of a transformer call without running it: a copy on the meta device under torch's FLOP counter."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from diffusers.models.attention_dispatch import attention_backend
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from ..errors import AccelError
from .trace import DENOISER

# Torch's counter knows the attention kernels of a GPU only.
CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v)
}
_COUNTED: dict[tuple, dict[str, int] | None] = {}  # None where only a call can be counted


def count_flops(
    model: nn.Module, x: Tensor, inputs: dict[str, Any], call: Callable[[], Any] | None = None
) -> dict[str, int]:
    """FLOPs of one call on latents x with these inputs: of the full call under "denoiser", and by module name.

    Counted once per architecture and shapes, without running the model; where its operations depend on a mask's values,
    once for each mask by `call`, which runs it. A multiply-add counts as two; element-wise operations are not counted.
    Raises AccelError if there is no `call` then.
    """
    inputs = {"hidden_states": x, **inputs}
    shapes = tree_map(lambda v: tuple(v.shape) if isinstance(v, Tensor) else v, inputs)
    key = (type(model), str(sorted(dict(model.config).items(), key=str)), str(sorted(shapes.items())))
    if key not in _COUNTED:
        try:
            _COUNTED[key] = _count(_meta_call(model, inputs))
        except (NotImplementedError, RuntimeError):
            _COUNTED[key] = None
    if (flops := _COUNTED[key]) is not None:
        return flops
    if call is None:
        raise AccelError(f"the FLOPs of {type(model).__name__} can be counted only by running it")
    masks = {name: v.tolist() for name, v in inputs.items() if isinstance(v, Tensor) and "mask" in name}
    if (key := (*key, str(masks))) not in _COUNTED:
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
    counter = FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION)
    with counter, torch.no_grad(), attention_backend("native"):
        call()
    total: dict[str, int] = defaultdict(int)
    for name, ops in counter.get_flop_counts().items():
        if name != "Global":
            total[name.partition(".")[2] or DENOISER] = sum(ops.values())
    return dict(total)
