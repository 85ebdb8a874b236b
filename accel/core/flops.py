"""Counts the FLOPs of a transformer call without running it: a copy on the meta device under torch's FLOP counter."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from threading import RLock, get_ident
from typing import Any

import torch
from diffusers.models.attention_dispatch import attention_backend
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from torch.utils.module_tracker import ModuleTracker

from ..errors import AccelError
from .trace import DENOISER

# Torch's counter knows the attention kernels of a GPU only.
CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v)
}
_COUNTED: dict[tuple, dict[str, int] | None] = {}  # None where only a call can be counted
MAX_COUNTED = 64  # calls that are remembered: with masks, each length of a prompt is another one
_ONE_AT_A_TIME = RLock()


def count_flops(
    model: nn.Module, x: Tensor, inputs: dict[str, Any], call: Callable[[], Any] | None = None
) -> dict[str, int]:
    """FLOPs of one call on latents x with these inputs: of the full call under "denoiser", and by module name.

    Counted once per architecture and shapes, without running the model; where its operations depend on a mask's values,
    once for each number of tokens that the mask keeps, by `call`, which runs it. A multiply-add counts as two;
    element-wise operations are not counted. Raises AccelError if there is no `call` then.
    """
    with _ONE_AT_A_TIME:
        return _remembered(model, {"hidden_states": x, **inputs}, call)


def _remembered(model: nn.Module, inputs: dict[str, Any], call: Callable[[], Any] | None) -> dict[str, int]:
    shapes = tree_map(lambda v: tuple(v.shape) if isinstance(v, Tensor) else v, inputs)
    key = (type(model), str(sorted(dict(model.config).items(), key=str)), str(sorted(shapes.items())))
    if key not in _COUNTED:
        try:
            _remember(key, _count(_meta_call(model, inputs)))
        except (NotImplementedError, RuntimeError):
            _remember(key, None)
    if (flops := _COUNTED[key]) is not None:
        return flops
    if call is None:
        raise AccelError(f"the FLOPs of {type(model).__name__} can be counted only by running it")
    kept = {
        name: v.count_nonzero(-1).tolist() for name, v in inputs.items() if isinstance(v, Tensor) and "mask" in name
    }
    if (key := (*key, str(kept))) not in _COUNTED:
        with _uncompiled():
            _remember(key, _count(call))
    return _COUNTED[key]


def _remember(key: tuple, flops: dict[str, int] | None) -> None:
    _COUNTED[key] = flops
    while len(_COUNTED) > MAX_COUNTED:
        del _COUNTED[next(iter(_COUNTED))]


def _uncompiled() -> AbstractContextManager:
    """Inside, compiled blocks run as they were written: under a counter, torch refuses to compile, then and later."""
    is_used = "torch._dynamo" in sys.modules  # its import takes seconds
    return torch.compiler.set_stance("force_eager") if is_used else nullcontext()


def _meta_call(model: nn.Module, inputs: dict[str, Any]) -> Callable[[], Any]:
    """A call of a copy of the model on the meta device."""
    with torch.device("meta"):
        copy = type(model).from_config(model.config)
        zeros = lambda v: torch.zeros(v.shape, dtype=None if v.is_floating_point() else v.dtype)
        inputs = tree_map(lambda v: zeros(v) if isinstance(v, Tensor) else v, inputs)
    return lambda: copy(**inputs)


class _OwnModules(ModuleTracker):
    """Follows the modules that the counting thread calls; torch's hooks hear those of every thread."""

    def __init__(self):
        super().__init__()
        self.thread = get_ident()

    def _fw_pre_hook(self, *call) -> None:
        if get_ident() == self.thread:
            super()._fw_pre_hook(*call)

    def _fw_post_hook(self, *call) -> None:
        if get_ident() == self.thread:
            super()._fw_post_hook(*call)


def _count(call: Callable[[], Any]) -> dict[str, int]:
    counter = FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION)
    counter.mod_tracker = _OwnModules()
    with counter, torch.no_grad(), attention_backend("native"):
        call()
    total: dict[str, int] = defaultdict(int)
    for name, ops in counter.get_flop_counts().items():
        if name != "Global":
            total[name.partition(".")[2] or DENOISER] = sum(ops.values())
    return dict(total)
