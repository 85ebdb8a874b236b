"""Any diffusers attention with another softmax: its own processor runs, and the one call of the softmax is replaced.

In joint attention, text tokens stand before or after the video's. Methods see the video's alone; text is never reduced.
Letters: b batch, n video tokens, m of them that stay, t text tokens, k attention heads, d channels per head.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..errors import AccelError
from .attention import QKV, fold_bias_into_channels

SDPA = F.scaled_dot_product_attention
NAMES = ("query", "key", "value", "attn_mask")


class _ReplacedSoftmax(TorchFunctionMode):
    """Calls `attention(query, key, value, attn_mask, **options)` in place of torch's; tensors are (b, k, n + t, d)."""

    def __init__(self, attention: Callable):
        super().__init__()
        self.attention, self.calls = attention, 0

    def __torch_function__(self, func: Callable, types, args=(), kwargs=None) -> Any:
        if func is not SDPA:
            return func(*args, **(kwargs or {}))
        self.calls += 1
        return self.attention(**dict(zip(NAMES, args)), **(kwargs or {}))


def with_softmax(core: Callable, video_tokens: Callable[[int], slice | None], original: Callable, *inputs, **named):
    """What an attention processor returns, with `core(qkv, softmax)` in place of its softmax on the video's tokens.

    `video_tokens` says which of so many tokens are the video's; None: this attention is left alone. A softmax may come
    once for each sample. Raises AccelError where it is not torch's own.
    """
    samples = count()

    def attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **options) -> Tensor:
        video = video_tokens(query.shape[2])
        if video is None or query.shape[2] != key.shape[2]:
            return SDPA(query, key, value, attn_mask=attn_mask, **options)
        return JointSoftmax(query, key, value, attn_mask, video, options).run(core, next(samples))

    with _ReplacedSoftmax(attention) as mode:
        out = original(*inputs, **named)
    if mode.calls == 0:
        raise AccelError(
            "tokens can be reduced only where an attention calls torch's scaled_dot_product_attention: choose the "
            "attention backend native"
        )
    return out


def runs_flash(q: Tensor) -> bool:
    """Whether a softmax without a mask is a flash kernel, which takes none."""
    return q.is_cuda


class JointSoftmax:
    """One softmax over video and text, whose video tokens a method may reduce."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, video: slice, options: dict[str, Any]):
        self.tensors, self.mask, self.options = (q, k, v), mask, options
        self.start, self.stop = video.start, video.stop
        self.text: Tensor | None = None  # the output's text rows (b, k, t, d), of the first call
        self.full: Tensor | None = None  # the output (b, k, n + t, d) of a softmax over everything,
        self.full_video: Tensor | None = None  # and its video rows (b, n, k, d)

    def run(self, core: Callable, sample: int) -> Tensor:
        """The output (b, k, n + t, d)."""
        self.video = [x[:, :, self.start : self.stop].transpose(1, 2) for x in self.tensors]
        qkv = QKV(*self.video)
        qkv.text_tokens, qkv.sample = self.tensors[0].shape[2] - qkv.shape[1], sample
        y = core(qkv, self._softmax)
        if y is self.full_video:
            return self.full
        return y.transpose(1, 2) if self.text is None else self._insert(y.transpose(1, 2), self.text)

    def _softmax(self, qkv: QKV) -> Tensor:
        """The video's rows (b, m, k, d) of the output for any number of its queries and keys."""
        if qkv.bias is None and all(x is y for x, y in zip((qkv.q, qkv.k, qkv.v), self.video)):
            self.full = SDPA(*self.tensors, attn_mask=self.mask, **self.options)
            self.full_video = self._without_text(self.full, self.stop)
            return self.full_video
        video = [x.transpose(1, 2) for x in (qkv.query(), qkv.key(), qkv.value())]
        q, k, v = (self._insert(x, self._text_of(whole)) for x, whole in zip(video, self.tensors))
        bias, options = qkv.bias, self.options
        if bias is not None and self.mask is None and runs_flash(q):
            scale = options.get("scale") or q.shape[-1] ** -0.5  # processors may give None
            options = {**options, "scale": scale}
            whole_bias = F.pad(bias, (self.start, k.shape[2] - self.start - video[1].shape[2]))
            folded = fold_bias_into_channels(*(x.transpose(1, 2) for x in (q, k, v)), whole_bias)
            (q, k, v), bias = (x.transpose(1, 2) for x in folded), None
        mask = self._mask(video[0].shape[2], video[1].shape[2], bias, q.dtype)
        y = SDPA(q, k, v, attn_mask=mask, **options)[..., : qkv.shape[3]]
        return self._without_text(y, self.start + video[0].shape[2])

    def _without_text(self, y: Tensor, stop: int) -> Tensor:
        """The video's rows (b, m, k, d) of an output, as a view; the text's are kept."""
        if self.text is None and y.shape[2] > stop - self.start:
            self.text = torch.cat([y[:, :, : self.start], y[:, :, stop:]], 2)
        return y[:, :, self.start : stop].transpose(1, 2)

    def _text_of(self, x: Tensor) -> Tensor:
        return torch.cat([x[:, :, : self.start], x[:, :, self.stop :]], 2)

    def _insert(self, video: Tensor, text: Tensor) -> Tensor:
        """The joint sequence of video rows (b, k, m, d) and text rows (b, k, t, d)."""
        if not text.shape[2]:
            return video
        return torch.cat([text[:, :, : self.start], video, text[:, :, self.start :]], 2)

    def _mask(self, queries: int, keys: int, bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """The mask for so many video queries and keys. `bias` is added to the video's keys.

        Raises AccelError for fewer of them under a mask that hides video from video.
        """
        mask = self.mask
        if mask is not None:
            if min(queries, keys) < self.stop - self.start and self._hides_video(mask):
                raise AccelError(
                    "fewer tokens and an attention that hides frames from each other (causal blocks) do not go "
                    "together: leave asymrnr out, or causal_block_size"
                )
            mask = self._shortened(mask, 3, keys) if mask.shape[3] > 1 else mask
            mask = self._shortened(mask, 2, queries) if mask.shape[2] > 1 else mask
        if bias is None:
            return mask
        text = self.tensors[0].shape[2] - (self.stop - self.start)
        added = F.pad(bias, (self.start, text - self.start)).to(dtype)
        if mask is None:
            return added
        return added.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else added + mask

    def _hides_video(self, mask: Tensor) -> bool:
        """Whether a mask hides any video key from the first or the last video query, as causal ones and windows do."""
        if mask.shape[2] == 1 or mask.shape[3] == 1:
            return False
        ends = mask[:, :, [self.start, self.stop - 1], self.start : self.stop]
        return not bool((ends if mask.dtype == torch.bool else ends == 0).all())

    def _shortened(self, mask: Tensor, dim: int, length: int) -> Tensor:
        """The mask with the first `length` of the video's entries along a dimension."""
        stop = self.start + length
        parts = mask.narrow(dim, 0, stop), mask.narrow(dim, self.stop, mask.shape[dim] - self.stop)
        return mask if stop == self.stop else torch.cat(parts, dim)
