"""A call of a transformer: which pipeline makes it, its halves under guidance, its wrappers, and its time."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from ..errors import AccelError, amount


def running_call(pipe) -> tuple[Any, dict[str, Any]]:
    """The diffusers pipeline that is running now, and the local variables of its call; `pipe` if none is.

    A transformer can be in several pipelines, and which one of them calls it is nowhere else to be seen.
    """
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "__call__" and isinstance(frame.f_locals.get("self"), DiffusionPipeline):
            return frame.f_locals["self"], frame.f_locals
        frame = frame.f_back
    return pipe, {}


def halves(x: Tensor, inputs: dict[str, Any]) -> tuple[tuple[Tensor, dict[str, Any]], tuple[Tensor, dict[str, Any]]]:
    """The two halves of a batch: latents, and the inputs of which every tensor with an entry per sample is halved.

    Raises AccelError where the text has entries for another number of samples: a half would get that of both.
    """
    is_tensor = lambda v: isinstance(v, Tensor) and v.ndim > 0
    for name, v in inputs.items():
        if name.startswith("encoder_") and is_tensor(v) and len(v) not in (1, len(x)):
            raise AccelError(
                f"{name} has {amount(len(v), 'entry', 'entries')} for a batch of {len(x)}: repeat given embeddings and "
                "their masks as often as num_videos_per_prompt"
            )
    batched = lambda v: is_tensor(v) and len(v) == len(x)
    parts = {name: v.chunk(2) if batched(v) else (v, v) for name, v in inputs.items()}
    return tuple((half, {name: part[i] for name, part in parts.items()}) for i, half in enumerate(x.chunk(2)))


def compose(call: Callable, wrappers: list[Callable]) -> Callable:
    """The call inside all wrappers, the last one outermost."""
    for fn in wrappers:
        call = partial(fn, call)
    return call


def synchronized_time(device: torch.device) -> float:
    """A clock reading in seconds, after all work queued on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
