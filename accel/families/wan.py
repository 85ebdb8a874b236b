"""Wan 2.1 and 2.2 (`WanPipeline` and its relatives): one or two transformers, guidance in two calls."""

from __future__ import annotations

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
