"""Wan 2.1 and 2.2 (`WanPipeline` and its relatives): one or two transformers, guidance in two calls."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def denoisers(pipe) -> list[nn.Module]:
    """The transformers in the order of use; Wan 2.2 has a second one for low noise."""
    both = (pipe.transformer, getattr(pipe, "transformer_2", None))
    return [model for model in both if model is not None]


def attentions(model: nn.Module) -> dict[str, nn.Module]:
    """Each block's video self-attention by its site name."""
    return {f"blocks.{i}.attn1": block.attn1 for i, block in enumerate(model.blocks)}


def blocks(model: nn.Module) -> nn.ModuleList:
    """The stack of blocks; each maps (hidden, text, time, rope) to hidden (b, n, d)."""
    return model.blocks


def grid(model: nn.Module, x: Tensor) -> tuple[int, int, int]:
    """Tokens (f, h, w) of latents x (b, c, f, h, w); raster order."""
    return tuple(n // p for n, p in zip(x.shape[2:], model.config.patch_size))


def is_guided(pipe) -> bool:
    """True while the pipeline runs an unconditional branch."""
    return bool(pipe.do_classifier_free_guidance)


def width(model: nn.Module) -> int:
    """Channels of a token inside the blocks."""
    return model.config.num_attention_heads * model.config.attention_head_dim


def attend(attn: nn.Module, core, x: Tensor, text=None, mask=None, rope: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """A self-attention (b, n, d) with `core(q, k, v)` (b, n, h, d) in place of its softmax; else as the stock one."""
    q, k, v = attn.to_qkv(x).chunk(3, -1) if attn.fused_projections else (attn.to_q(x), attn.to_k(x), attn.to_v(x))
    q, k, v = (y.unflatten(2, (attn.heads, -1)) for y in (attn.norm_q(q), attn.norm_k(k), v))
    y = core(_turned(q, *rope), _turned(k, *rope), v)
    return attn.to_out[1](attn.to_out[0](y.flatten(2, 3).type_as(q)))


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x (b, n, h, d): each pair of channels turned by its angle."""
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[..., 0::2], sin[..., 1::2]
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2).type_as(x)
