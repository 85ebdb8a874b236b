"""The core of a self-attention, opened: a processor whose softmax a function stands around.

Compiled blocks see one opaque operator with the layer's number in a tensor, so that all blocks share a graph and
nothing is compiled anew when the function takes another decision.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from types import ModuleType

import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor, nn

_OPEN: dict[int, Callable] = {}  # layer number -> its core, for the operator
_NUMBERS = count()


@torch.library.custom_op("accel::core", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def _core(q: Tensor, k: Tensor, v: Tensor, number: Tensor) -> Tensor:
    return _OPEN[int(number)](q, k, v).contiguous()


@_core.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, number: Tensor) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)


class Opened:
    """Attention processor: the family's projections, and `around(inner, q, k, v)` in place of the softmax."""

    _attention_backend = None  # `set_attention_backend` finds and sets these two on any processor
    _parallel_config = None

    def __init__(self, family: ModuleType, around: Callable):
        self.family, self.around = family, around
        self.number = torch.tensor(next(_NUMBERS))

    def __call__(self, attn: nn.Module, *args, **kwargs) -> Tensor:
        if torch.compiler.is_compiling():
            return self.family.attend(attn, lambda q, k, v: torch.ops.accel.core(q, k, v, self.number), *args, **kwargs)
        return self.family.attend(attn, self.run, *args, **kwargs)

    def run(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.around(self.inner, q, k, v)

    def inner(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
        """Softmax attention of heads (b, n, h, d) on the backend that was chosen; `bias` (b, 1 or h, 1, keys)."""
        backend, d = self._attention_backend, q.shape[-1]
        if bias is not None and "sage" in str(backend):
            raise ValueError(f"attention backend {backend} takes no bias: switch the size bias off or choose another")
        if bias is not None and q.is_cuda:
            return dispatch_attention_fn(*folded(q, k, v, bias), scale=d**-0.5, backend=backend)[..., :d]
        bias = bias if bias is None else bias.to(q.dtype)
        return dispatch_attention_fn(q, k, v, attn_mask=bias, backend=backend)


def folded(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Heads with eight more channels whose product is the bias: flash kernels take no mask. The scale stays that of d.

    The result's first d channels are those of attention with `bias` (b, 1 or h, 1, keys) added to its logits.
    """
    b, n, h, d = k.shape
    logits = (bias.squeeze(2) * d**0.5).expand(b, h, n).transpose(1, 2)
    wide = [F.pad(x, (0, 8)) for x in (q, k, v)]
    wide[0][..., d], wide[1][..., d] = 1, logits.to(k.dtype)
    return tuple(wide)


@contextmanager
def opened(module: nn.Module, family: ModuleType, around: Callable) -> Iterator[None]:
    """The attention module with an `Opened` processor. Raises ValueError where that one would not do the same."""
    stock = module.processor
    if getattr(stock, "_parallel_config", None) is not None:
        raise ValueError("tokens cannot be reduced under context parallelism: each device sees only a part of the grid")
    if not type(stock).__module__.startswith("diffusers."):
        raise ValueError(f"{type(stock).__name__} is no attention processor of diffusers: tokens inside it are unknown")
    mine = Opened(family, around)
    mine._attention_backend = getattr(stock, "_attention_backend", None)
    _OPEN[int(mine.number)] = mine.run
    module.processor = mine
    try:
        yield
    finally:
        if mine._attention_backend != getattr(stock, "_attention_backend", None):  # it was chosen meanwhile
            stock._attention_backend = mine._attention_backend
        module.processor = stock
        del _OPEN[int(mine.number)]
