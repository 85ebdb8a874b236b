"""Wan 2.1 and 2.2 (`WanPipeline` and its relatives): one or two transformers, guidance in two calls."""

from __future__ import annotations

from collections.abc import Callable

import torch
from diffusers.models.transformers.transformer_wan import WanTransformerBlock
from torch import Tensor, nn

from ..core.attention import QKV
from ..core.lazy_qkv import LazyQKV, Projections
from .base import Family


class Wan(Family):
    """The family of `WanTransformer3DModel`."""

    pipelines = ("Wan",)
    blocks = ("blocks",)
    attention = "attn1"
    compiles_attention = True
    trains_students = True
    remarks = {
        **dict.fromkeys(("disca", "stepcache"), "yes; not VACE and Animate"),
        **dict.fromkeys(("gpd", "meanflow"), "after training; Wan 2.1 from text"),
        "fittedsolver": "after a fit, from text; not with two transformers",
    }

    def denoisers(self, pipe) -> list[nn.Module]:
        """The transformers in the order of use; Wan 2.2 has a second one for low noise, and either may be missing."""
        both = (pipe.transformer, getattr(pipe, "transformer_2", None))
        return [model for model in both if model is not None]

    def is_stack(self, model: nn.Module) -> bool:
        """Whether the model does nothing between two blocks: VACE and Animate add to the hidden states there."""
        return type(model).__name__ == "WanTransformer3DModel"

    def call_inputs(self, model: nn.Module, text_length: int) -> dict[str, Tensor]:
        """Timestep and text of a call for one prompt."""
        text = torch.empty(1, text_length, model.config.text_dim, device="meta")
        return {"timestep": torch.empty(1, device="meta"), "encoder_hidden_states": text}

    def new_block(self, model: nn.Module) -> WanTransformerBlock:
        """A block of the model's kind with fresh random weights."""
        c, d = model.config, self.hidden_size(model)
        return WanTransformerBlock(d, c.ffn_dim, c.num_attention_heads, c.qk_norm, c.cross_attn_norm, c.eps)

    def run_attention(
        self, attn: nn.Module, original: Callable, core: Callable[[QKV], Tensor], video: int, x: Tensor,
        text=None, mask=None, rope=None,
    ) -> Tensor:  # fmt: skip
        """Output (b, n, d) of a self-attention with `core` in place of its softmax; it projects only what stays."""
        qkv = self.qkv(attn, x, rope)
        return qkv.project_out(core(qkv))

    def qkv(self, attn: nn.Module, x: Tensor, rope: tuple[Tensor, Tensor] | None) -> LazyQKV:
        """Queries, keys and values of a self-attention on hidden x (b, n, d), projected on demand."""
        projections = Projections(
            heads=attn.heads,
            head_dim=attn.inner_dim // attn.heads,
            query=attn.to_q,
            key=attn.to_k,
            value=attn.to_v,
            norm_query=attn.norm_q,
            norm_key=attn.norm_k,
            output=lambda y: attn.to_out[1](attn.to_out[0](y)),
            fused=attn.to_qkv if attn.fused_projections else None,
            rope=rope,
            rotate=_rotate,
            rotate_rows=_rotate_rows,
        )
        return LazyQKV(x, projections)


def _rotate(y: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary embedding of y (b, n, k, d) by the stock attention's own operations: bitwise equal on every device."""
    (a, b), (cos, sin) = y.unflatten(-1, (-1, 2)).unbind(-1), (table[..., i::2] for i, table in enumerate(rope))
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2).type_as(y)


def _rotate_rows(y: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """The same for some tokens y (b, m, k, d) and their rows (b, m, 1, d) of the tables, as one complex product."""
    cos, sin = rope
    at_least = torch.promote_types(torch.float32, cos.dtype)  # bfloat16 has no complex numbers
    pairs = y.unflatten(-1, (-1, 2)).to(torch.promote_types(y.dtype, at_least)).contiguous()
    turns = torch.complex(*(t.to(pairs.dtype).contiguous() for t in (cos[..., 0::2], sin[..., 1::2])))
    return torch.view_as_real(torch.view_as_complex(pairs) * turns).flatten(-2).type_as(y)
