"""Wan 2.1 and 2.2 (`WanPipeline` and its relatives): one or two transformers, guidance in two calls."""

from __future__ import annotations

import torch
from diffusers.models.transformers.transformer_wan import WanTransformerBlock
from torch import Tensor, nn

from ..core.attention import QKV
from ..ops.tokens import Reduction

BLOCKS_ATTR = "blocks"  # the attribute that holds them
STACKABLE = ("WanTransformer3DModel",)  # classes that go from block to block and do nothing between them


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


def new_block(model: nn.Module) -> WanTransformerBlock:
    """A block of the model's kind with weights of its own."""
    c = model.config
    return WanTransformerBlock(
        hidden_size(model), c.ffn_dim, c.num_attention_heads, c.qk_norm, c.cross_attn_norm, c.eps
    )


def grid(model: nn.Module, x: Tensor) -> tuple[int, int, int]:
    """Tokens (f, h, w) of latents x (b, c, f, h, w); raster order."""
    return tuple(n // p for n, p in zip(x.shape[2:], model.config.patch_size))


def is_guided(pipe) -> bool:
    """True while the pipeline runs an unconditional branch."""
    return bool(pipe.do_classifier_free_guidance)


def hidden_size(model: nn.Module) -> int:
    """Channels of a token inside the blocks."""
    return model.config.num_attention_heads * model.config.attention_head_dim


def run_attention(
    attn: nn.Module, core, x: Tensor, text=None, mask=None, rope: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """A self-attention (b, n, d) with `core(heads)` (b, n or m, h, d) for its softmax; else as the stock one."""
    qkv = LazyQKV(attn, x, rope)
    return qkv.project_out(core(qkv))


class LazyQKV(QKV):
    """Heads over hidden x (b, n, d), projected when they are asked for, and then only for the tokens that stay.

    Norm and rotary embedding work on each token alone, values and outputs are linear: the result is the same, and the
    projections of removed tokens are spared, where heads share a plan and are not wanted whole (for matching).
    """

    def __init__(self, attn: nn.Module, x: Tensor, rope: tuple[Tensor, Tensor]):
        super().__init__(None, None, None)
        self.attn, self.x, self.rope = attn, x, rope
        self.late: tuple[Reduction | None, Tensor | None] = (None, None)  # what `finish` restores by, and adds
        self.whole: tuple[Tensor | None, Tensor | None] = (None, None)  # an output and its projection
        self.short: dict[tuple[int, bool], Tensor] = {}  # hidden of the tokens that a cut leaves, for all that ask
        if attn.fused_projections:
            q, k, v = attn.to_qkv(x).chunk(3, -1)
            self.q, self.k, self.v = self._turned(attn.norm_q(q)), self._turned(attn.norm_k(k)), self._split(v)

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.x.shape[:2], self.attn.heads, self.attn.inner_dim // self.attn.heads)

    def query(self, cut: Reduction | None = None, mean: bool = False) -> Tensor:
        return self._placed("q", cut, mean)

    def key(self, cut: Reduction | None = None, mean: bool = False) -> Tensor:
        return self._placed("k", cut, mean)

    def value(self, cut: Reduction | None = None, mean: bool = False) -> Tensor:
        if self.v is None and self._may(cut):
            return self._split(self._narrow(self.attn.to_v, cut, mean))
        if self.v is None:
            self.v = self._split(self.attn.to_v(self.x))
        return self.reduce(self.v, cut, mean)

    def restore(self, y: Tensor, cut: Reduction | None, residual: Tensor | None = None) -> Tensor:
        if not self._waits(cut):
            return super().restore(y, cut, residual)
        self.late = cut, residual
        if cut is not None:
            self._spare(cut)
        return y

    def residual(self, whole: Tensor, short: Tensor, cut: Reduction | None) -> Tensor:
        if not self._waits(cut):
            return super().residual(whole, short, cut)
        self.whole = whole, self._out(whole)
        self.saved_flops -= 2 * short[:, :, 0, 0].numel() * self.x.shape[2] ** 2
        return self.whole[1] - self._long(self._out(short), cut)

    def project_out(self, y: Tensor) -> Tensor:
        """The projected output (b, n, d) of what the core gave."""
        out = self.whole[1] if y is self.whole[0] else self._out(y)
        cut, residual = self.late
        if cut is None and residual is None:
            return out
        return self._long(out, cut, residual)

    def _out(self, y: Tensor) -> Tensor:
        return self.attn.to_out[1](self.attn.to_out[0](y.flatten(2, 3).type_as(self.x)))

    def _long(self, y: Tensor, cut: Reduction | None, residual: Tensor | None = None) -> Tensor:
        """`Heads.restore` of a projected output (b, m, d)."""
        return super().restore(y[:, :, None], cut, None if residual is None else residual[:, :, None]).squeeze(2)

    def _waits(self, cut: Reduction | None) -> bool:
        """Whether restoring may wait until after the projection."""
        return cut is None or self._may(cut)

    def _may(self, cut: Reduction | None) -> bool:
        return cut is not None and len(cut.keep) == len(self.x)

    def _placed(self, name: str, cut: Reduction | None, mean: bool) -> Tensor:
        """Queries ("q") or keys ("k"), which alone carry norm and position; means are taken of whole ones."""
        whole, layer, norm = getattr(self, name), getattr(self.attn, f"to_{name}"), getattr(self.attn, f"norm_{name}")
        if whole is None and self._may(cut) and not mean:
            return self._turned(norm(self._narrow(layer, cut)), cut)
        if whole is None:
            whole = self._turned(norm(layer(self.x)))
            setattr(self, name, whole)
        return self.reduce(whole, cut, mean)

    def _narrow(self, layer: nn.Module, cut: Reduction, mean: bool = False) -> Tensor:
        """A projection (b, m, d) of the tokens that stay."""
        self._spare(cut)
        if (id(cut), mean) not in self.short:
            self.short[id(cut), mean] = self.reduce(self.x[:, :, None], cut, mean).squeeze(2)
        return layer(self.short[id(cut), mean])

    def _spare(self, cut: Reduction) -> None:
        b, n, d = self.x.shape
        self.saved_flops += 2 * b * (n - cut.keep.shape[1]) * d**2

    def _split(self, y: Tensor) -> Tensor:
        return y.unflatten(2, self.shape[2:])

    def _turned(self, y: Tensor, cut: Reduction | None = None) -> Tensor:
        """Rotary embedding of y (b, m, h d) as (b, m, h, d): each pair of channels turned by its token's angle."""
        pairs = self._split(y).unflatten(-1, (-1, 2))
        if cut is None:  # in the stock attention's own operations: bitwise the same on every device
            (a, b), (cos, sin) = pairs.unbind(-1), (table[..., i::2] for i, table in enumerate(self.rope))
            return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2).type_as(y)
        with self.timer:
            cos, sin = (table[0][cut.keep] for table in self.rope)
        at_least = torch.promote_types(torch.float32, cos.dtype)  # there are no complex numbers of two bfloat16
        pairs = pairs.to(torch.promote_types(y.dtype, at_least)).contiguous()
        turns = torch.complex(*(t.to(pairs.dtype).contiguous() for t in (cos[..., 0::2], sin[..., 1::2])))
        return torch.view_as_real(torch.view_as_complex(pairs) * turns).flatten(-2).type_as(y)
