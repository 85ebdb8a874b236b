"""Attention processors that let methods wrap a self-attention: all of it, or its softmax with queries, keys and values.

In compiled blocks the attention is a custom operator that gets the layer's id as a tensor. So all blocks share one
graph, and methods may decide differently at each step without recompilation.
Letters: b batch, n tokens, m tokens that stay, k attention heads, d channels per head (of hidden states: the width).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial, wraps
from itertools import count
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor, nn

from ..errors import AccelError
from ..ops.token_matching import Reduction
from .trace import Timer

if TYPE_CHECKING:
    from ..families import Family

_INTERCEPTED: dict[int, InterceptedProcessor] = {}  # by layer id, for the operators below
_LAYER_IDS = count()


@torch.library.custom_op("accel::core", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def _core(q: Tensor, k: Tensor, v: Tensor, layer_id: Tensor) -> Tensor:
    return _INTERCEPTED[int(layer_id)].run_core(QKV(q, k, v)).contiguous()


@_core.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, layer_id: Tensor) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)


@torch.library.custom_op("accel::attention", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def _attention(x: Tensor, rope: list[Tensor], layer_id: Tensor) -> Tensor:
    processor = _INTERCEPTED[int(layer_id)]
    # The compiled graph may write into the result, which a method may have cached: hence the clone.
    return processor.run_attention(processor.attn, x, None, None, tuple(rope) or None).clone()


@_attention.register_fake
def _(x: Tensor, rope: list[Tensor], layer_id: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


class QKV:
    """Queries, keys and values (b, n, k, d) of a self-attention, after normalisation and rotary embedding.

    `bias` (b, 1 or k, 1, keys) is added to the logits. `query`, `key` and `value` return all tokens, or those that a
    reduction keeps. `text_tokens` are attended beside them in joint attention. `sample` is the place in the batch,
    where each sample has a softmax of its own. `saved_flops` counts FLOPs of the model, outside the core, that
    reductions saved. `timer` runs while tokens are gathered.
    """

    def __init__(self, q: Tensor | None, k: Tensor | None, v: Tensor | None, bias: Tensor | None = None):
        self.q, self.k, self.v, self.bias = q, k, v, bias
        self.text_tokens, self.sample, self.saved_flops, self.timer = 0, 0, 0, Timer()

    @property
    def shape(self) -> tuple[int, ...]:
        """(b, n, k, d) of all tokens."""
        return tuple(self.q.shape)

    def query(self, reduction: Reduction | None = None, mean: bool = False) -> Tensor:
        """Queries (b, n, k, d), or (b, m, k, d) of the tokens that stay; `mean` averages over those they replace."""
        return self.reduce(self.q, reduction, mean)

    def key(self, reduction: Reduction | None = None, mean: bool = False) -> Tensor:
        """Keys, likewise."""
        return self.reduce(self.k, reduction, mean)

    def value(self, reduction: Reduction | None = None, mean: bool = False) -> Tensor:
        """Values, likewise."""
        return self.reduce(self.v, reduction, mean)

    def reduce(self, x: Tensor, reduction: Reduction | None, mean: bool = False) -> Tensor:
        """x (b, n, k, d) reduced to (b, m, k, d); unchanged without a reduction."""
        if reduction is None:
            return x
        with self.timer:
            return reduction.reduce(x, mean)

    def restore(self, y: Tensor, reduction: Reduction | None, residual: Tensor | None = None) -> Tensor:
        """A core's output y (b, m, k, d) at full length (b, n, k, d), plus `residual`, added in place.

        A subclass may put both off until after the output projection.
        """
        with self.timer:
            y = y if reduction is None else reduction.restore(y)
            return y if residual is None else y.add_(residual)

    def residual(self, full: Tensor, reduced: Tensor, reduction: Reduction | None) -> Tensor:
        """What `restore` must add to the reduced output (b, m, k, d) to give the full output (b, n, k, d)."""
        return full - self.restore(reduced, reduction)


def _attribute_of_original(name: str) -> property:
    """An attribute that diffusers reads and sets on any processor, forwarded to the original one."""
    return property(
        lambda self: getattr(self.original, name, None), lambda self, value: setattr(self.original, name, value)
    )


class InterceptedProcessor:
    """A place of the host: an attention processor that runs the original one inside wrappers; either may be None.

    `output_wrapper(call)` returns what the attention returns. `core_wrapper(softmax_attention, qkv)` returns its
    softmax's output (b, n, k, d); the family runs the attention around it.
    """

    _attention_backend = _attribute_of_original("_attention_backend")
    _parallel_config = _attribute_of_original("_parallel_config")

    def __init__(
        self, attn: nn.Module, family: Family, video_tokens: Callable[[], int],
        core_wrapper: Callable | None = None, output_wrapper: Callable | None = None,
    ):  # fmt: skip
        """`video_tokens()` tells how many tokens the video of the current call has."""
        self.attn, self.original, self.family, self.video_tokens = attn, attn.processor, family, video_tokens
        self.core_wrapper, self.output_wrapper = core_wrapper, output_wrapper
        self.has_output_wrapper = output_wrapper is not None  # a compiler may guard on this: it is so in all blocks
        self.layer_id = torch.tensor(next(_LAYER_IDS))

    @classmethod
    def of(cls, attn: nn.Module, *inputs) -> InterceptedProcessor:
        """One with the parameters of the attention's own processor: diffusers passes on only what it finds there."""
        return _with_signature_of(type(attn.processor))(attn, *inputs)

    def take(self) -> None:
        """Set it. Raises AccelError where the family's attention would not compute what the original does."""
        if self.core_wrapper:
            _check_core_is_known(self.original)
        _INTERCEPTED[int(self.layer_id)] = self
        self.attn.processor = self

    @property
    def is_held(self) -> bool:
        """Whether it is still the attention's processor."""
        return self.attn.processor is self

    def leave(self) -> None:
        """Put the original processor back, unless another one was set in the meantime."""
        if self.attn.processor is self:
            self.attn.processor = self.original
        _INTERCEPTED.pop(int(self.layer_id), None)

    def __call__(self, attn: nn.Module, *inputs, **named):
        if not torch.compiler.is_compiling():
            return self.run_attention(attn, *inputs, **named)
        if not self.family.compiles_attention:
            return self._run_eagerly(attn, *inputs, **named)
        x, _, _, rope = inputs
        if self.has_output_wrapper:
            return torch.ops.accel.attention(x, list(rope or ()), self.layer_id)
        return self.family.run_attention(attn, self.original, self._compiled_core, 0, *inputs)

    def run_attention(self, attn: nn.Module, *inputs, **named):
        """What the attention returns, through the wrappers that are set."""
        if self.core_wrapper is None:
            call = partial(self.original, attn, *inputs, **named)
        else:
            run = partial(self.family.run_attention, attn, self.original, self.run_core, self.video_tokens())
            call = partial(run, *inputs, **named)
        return self.output_wrapper(call) if self.output_wrapper else call()

    _run_eagerly = torch.compiler.disable(run_attention)

    def _compiled_core(self, qkv: QKV) -> Tensor:
        return torch.ops.accel.core(qkv.query(), qkv.key(), qkv.value(), self.layer_id)

    def run_core(self, qkv: QKV, softmax: Callable | None = None) -> Tensor:
        """The core's output, through the core wrapper around `softmax`, or around attention on the user's backend."""
        return self.core_wrapper(softmax or self.softmax_attention, qkv)

    def softmax_attention(self, qkv: QKV) -> Tensor:
        """Softmax attention (b, n, k, d) on the backend that the user chose."""
        q, k, v, bias = qkv.query(), qkv.key(), qkv.value(), qkv.bias
        backend, d = self._attention_backend, q.shape[-1]
        if bias is not None and q.is_cuda:
            q, k, v = fold_bias_into_channels(q, k, v, bias)
            return dispatch_attention_fn(q, k, v, scale=d**-0.5, backend=backend)[..., :d]
        bias = bias if bias is None else bias.to(q.dtype)
        return dispatch_attention_fn(q, k, v, attn_mask=bias, backend=backend)


def fold_bias_into_channels(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v (b, n, k, d) with eight more channels whose product is the bias: flash kernels take no mask.

    With the scale of d channels, the first d channels of the result are those of attention with `bias`
    (b, 1 or k, 1, keys) added to its logits.
    """
    b, n, h, d = k.shape
    logits = (bias.squeeze(2) * d**0.5).expand(b, h, n).transpose(1, 2)
    padded = [F.pad(x, (0, 8)) for x in (q, k, v)]
    padded[0][..., d], padded[1][..., d] = 1, logits.to(k.dtype)
    return tuple(padded)


@cache
def _with_signature_of(original: type) -> type[InterceptedProcessor]:
    @wraps(original.__call__)
    def call(self, *inputs, **named):
        return InterceptedProcessor.__call__(self, *inputs, **named)

    return type("InterceptedProcessor", (InterceptedProcessor,), {"__call__": call})


def _check_core_is_known(processor) -> None:
    """Raise AccelError if the family cannot stand in for what a processor does inside."""
    if getattr(processor, "_parallel_config", None) is not None:
        raise AccelError("tokens cannot be reduced under context parallelism: each device sees only a part of the grid")
    if not type(processor).__module__.startswith("diffusers."):
        raise AccelError(
            f"{type(processor).__name__} is no attention processor of diffusers: only in those can tokens be reduced"
        )
