"""Counts the FLOPs of a transformer call without running it: a copy on the meta device under torch's FLOP counter."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from diffusers.models.attention_dispatch import attention_backend
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from .trace import DENOISER

_COUNTED: dict[tuple, dict[str, int]] = {}


def count_flops(model: nn.Module, x: Tensor, inputs: dict[str, Any]) -> dict[str, int]:
    """FLOPs of one call on latents x with these inputs: of the full call under "denoiser", and by module name.

    Counted once per architecture and shapes. A multiply-add counts as two; element-wise operations are not counted.
    """
    tensors = {"hidden_states": x, **{k: v for k, v in inputs.items() if isinstance(v, Tensor)}}
    shapes = tuple((k, tuple(v.shape)) for k, v in sorted(tensors.items()))
    key = (type(model), str(sorted(dict(model.config).items(), key=str)), shapes)
    if key not in _COUNTED:
        with torch.device("meta"):
            copy = type(model).from_config(model.config)
            call = {k: torch.zeros(v.shape) for k, v in tensors.items()}
        with FlopCounterMode(display=False) as counter, torch.no_grad(), attention_backend("native"):
            copy(**call)
        total: dict[str, int] = defaultdict(int)
        for name, ops in counter.get_flop_counts().items():
            if name != "Global":
                total[name.partition(".")[2] or DENOISER] = sum(ops.values())
        _COUNTED[key] = dict(total)
    return _COUNTED[key]
