"""A self-attention, opened: a processor with functions around the whole of it, around its softmax, or both.

The latter gets the attention's `Heads`. A family may compute these only when they are asked for, and only for the
tokens that stay. Compiled blocks see one opaque operator with the layer's number in a tensor, so that all blocks share
a graph and nothing is compiled anew when a function takes another decision.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import count
from types import ModuleType

import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor, nn

from ..ops.tokens import Reduction
from .trace import Timer

_OPEN: dict[int, InterceptedProcessor] = {}  # by layer number, for the operators
_NUMBERS = count()


@torch.library.custom_op("accel::core", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def _core(q: Tensor, k: Tensor, v: Tensor, number: Tensor) -> Tensor:
    return _OPEN[int(number)].run(QKV(q, k, v)).contiguous()


@_core.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, number: Tensor) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)


@torch.library.custom_op("accel::attention", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def _attention(x: Tensor, rope: list[Tensor], number: Tensor) -> Tensor:
    mine = _OPEN[int(number)]
    return mine.whole(mine.attn, x, None, None, tuple(rope) or None).clone()  # the graph may write into what it gets


@_attention.register_fake
def _(x: Tensor, rope: list[Tensor], number: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


class QKV:
    """Queries, keys and values (b, n, h, d) of a self-attention, after norm and rotary embedding.

    `bias` (b, 1 or h, 1, keys) is added to the logits. `query`, `key` and `value` give all tokens, or a reduction of
    them: the kept ones, or (`mean`) means. `spared`: FLOPs of the model's own that the reductions saved besides the
    core's. `watch` runs while rows are moved.
    """

    def __init__(self, q: Tensor | None, k: Tensor | None, v: Tensor | None, bias: Tensor | None = None):
        self.q, self.k, self.v, self.bias = q, k, v, bias
        self.saved_flops, self.timer = 0, Timer()

    @property
    def shape(self) -> tuple[int, ...]:
        """(b, n, h, d) of all tokens."""
        return tuple(self.q.shape)

    def query(self, cut: Reduction | None = None, mean: bool = False) -> Tensor:
        """Queries (b, n, h, d), or those that a cut leaves."""
        return self.reduce(self.q, cut, mean)

    def key(self, cut: Reduction | None = None, mean: bool = False) -> Tensor:
        """Keys, likewise."""
        return self.reduce(self.k, cut, mean)

    def value(self, cut: Reduction | None = None, mean: bool = False) -> Tensor:
        """Values, likewise."""
        return self.reduce(self.v, cut, mean)

    def reduce(self, x: Tensor, cut: Reduction | None, mean: bool = False) -> Tensor:
        """x (b, n, h, d) as (b, m, h, d)."""
        if cut is None:
            return x
        with self.timer:
            return cut.reduce(x, mean)

    def restore(self, y: Tensor, cut: Reduction | None, residual: Tensor | None = None) -> Tensor:
        """The attention's output (b, m, h, d) at full length, and what the reduction `missed` added to it, in place.

        A family may put both off until after its projection.
        """
        with self.timer:
            y = y if cut is None else cut.restore(y)
            return y if residual is None else y.add_(residual)

    def residual(self, whole: Tensor, short: Tensor, cut: Reduction | None) -> Tensor:
        """What `restore` would have to add to the shortened output (b, m, h, d) to make it the whole (b, n, h, d)."""
        return whole - self.restore(short, cut)


def _of_stock(name: str) -> property:
    """An attribute that diffusers finds and sets on any processor: the stock one's."""
    return property(lambda self: getattr(self.stock, name, None), lambda self, value: setattr(self.stock, name, value))


class InterceptedProcessor:
    """Attention processor: the stock one within `outside(call)`; or the family's with `around(inner, heads)` in it."""

    _attention_backend = _of_stock("_attention_backend")
    _parallel_config = _of_stock("_parallel_config")

    def __init__(self, attn: nn.Module, family: ModuleType):
        self.attn, self.stock, self.family = attn, attn.processor, family
        self.core_wrapper: Callable | None = None
        self.output_wrapper: Callable | None = None
        self.encloses = False  # whether anything is outside: a compiler may look at it, as it is the same in all blocks
        self.number = torch.tensor(next(_NUMBERS))

    def __call__(self, attn: nn.Module, x: Tensor, text=None, mask=None, rope: tuple | None = None) -> Tensor:
        if not torch.compiler.is_compiling():
            return self.whole(attn, x, text, mask, rope)
        if self.encloses:
            return torch.ops.accel.attention(x, list(rope or ()), self.number)
        return self.family.run_attention(attn, self._compiled, x, text, mask, rope)

    def whole(self, attn: nn.Module, *inputs) -> Tensor:
        """The attention's output, with what was asked for around it and in it."""
        if self.core_wrapper is None:
            call = partial(self.stock, attn, *inputs)
        else:
            call = partial(self.family.run_attention, attn, self.run, *inputs)
        return self.output_wrapper(call) if self.output_wrapper else call()

    def _compiled(self, qkv: QKV) -> Tensor:
        return torch.ops.accel.core(qkv.query(), qkv.key(), qkv.value(), self.number)

    def run(self, qkv: QKV) -> Tensor:
        """What the attention gives, with what was asked for around its core."""
        return self.core_wrapper(self.inner, qkv)

    def inner(self, qkv: QKV) -> Tensor:
        """Softmax attention (b, n, h, d) on the backend that was chosen."""
        q, k, v, bias = qkv.query(), qkv.key(), qkv.value(), qkv.bias
        backend, d = self._attention_backend, q.shape[-1]
        name = str(getattr(backend, "value", backend))
        if bias is not None and "sage" in name:
            raise ValueError(f"attention backend {name} takes no bias: switch the size bias off or choose another")
        if bias is not None and q.is_cuda:
            return dispatch_attention_fn(*fold_bias_into_channels(q, k, v, bias), scale=d**-0.5, backend=backend)[
                ..., :d
            ]
        bias = bias if bias is None else bias.to(q.dtype)
        return dispatch_attention_fn(q, k, v, attn_mask=bias, backend=backend)


def fold_bias_into_channels(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Heads with eight more channels whose product is the bias: flash kernels take no mask. The scale stays that of d.

    The result's first d channels are those of attention with `bias` (b, 1 or h, 1, keys) added to its logits.
    """
    b, n, h, d = k.shape
    logits = (bias.squeeze(2) * d**0.5).expand(b, h, n).transpose(1, 2)
    expand_like = [F.pad(x, (0, 8)) for x in (q, k, v)]
    expand_like[0][..., d], expand_like[1][..., d] = 1, logits.to(k.dtype)
    return tuple(expand_like)


@contextmanager
def intercept_attention(
    module: nn.Module, family: ModuleType, core_wrapper: Callable | None = None, output_wrapper: Callable | None = None
) -> Iterator[None]:
    """The attention module with a function in it, or outside. Raises ValueError where it would not do the same."""
    with nullcontext() if isinstance(module.processor, InterceptedProcessor) else _replaced(module, family):
        mine = module.processor
        before = mine.core_wrapper, mine.output_wrapper, mine.encloses
        if core_wrapper:
            _check(mine.stock)
            mine.core_wrapper = core_wrapper
        if output_wrapper:
            mine.output_wrapper, mine.encloses = output_wrapper, True
        try:
            yield
        finally:
            mine.core_wrapper, mine.output_wrapper, mine.encloses = before


@contextmanager
def _replaced(module: nn.Module, family: ModuleType) -> Iterator[None]:
    mine = InterceptedProcessor(module, family)
    _OPEN[int(mine.number)] = mine
    module.processor = mine
    try:
        yield
    finally:
        module.processor = mine.stock
        del _OPEN[int(mine.number)]


def _check(stock) -> None:
    """Raise ValueError if the inside of a processor is not what a family knows."""
    if getattr(stock, "_parallel_config", None) is not None:
        raise ValueError("tokens cannot be reduced under context parallelism: each device sees only a part of the grid")
    if not type(stock).__module__.startswith("diffusers."):
        raise ValueError(f"{type(stock).__name__} is no attention processor of diffusers: tokens inside it are unknown")
