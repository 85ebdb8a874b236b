"""Makes the same network train faster on a device: attention and memory of a CPU, compiled blocks."""

from __future__ import annotations

import ctypes
import shutil
import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.attention import QKV
from ..families.wan import Wan


class _DenseBackward(torch.autograd.Function):
    """The fused kernel's forward pass; a backward pass of matrix products, from the row sums that it leaves."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        y, log_sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
        ctx.save_for_backward(q, k, v, y, log_sums)
        return y

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, y, log_sums = ctx.saved_tensors
        q = q * q.shape[-1] ** -0.5
        weights = ((q @ k.transpose(-1, -2)).float() - log_sums[..., None]).exp()
        mean = (grad.float() * y.float()).sum(-1, keepdim=True)
        scores = (weights * ((grad @ v.transpose(-1, -2)).float() - mean)).type_as(q)
        grad_k, grad_v = scores.transpose(-1, -2) @ q, weights.type_as(q).transpose(-1, -2) @ grad
        return scores @ k * q.shape[-1] ** -0.5, grad_k, grad_v


class DenseAttention:
    """Self-attention processor for training on a CPU with fast bfloat16.

    The fused kernel is the fastest forward pass, but its backward pass has a fifth of the speed of matrix products,
    whose scores fit in memory at a few thousand tokens. In float32 the fused kernel is the faster one in both.
    """

    def __call__(self, attn, x: Tensor, text=None, mask=None, rope: tuple[Tensor, Tensor] | None = None) -> Tensor:
        return Wan().run_attention(attn, None, self._core, 0, x, rope=rope)

    def _core(self, qkv: QKV) -> Tensor:
        v = qkv.value()
        q, k, v = (y.transpose(1, 2).type_as(v) for y in (qkv.query(), qkv.key(), v))
        attend = _DenseBackward.apply if torch.is_grad_enabled() else F.scaled_dot_product_attention
        return attend(q, k, v).transpose(1, 2)


class CrossAttention:
    """Cross-attention processor for training: two matrix products.

    With so few keys the scores are small, and the backward pass of the fused kernel is slow on a CPU: a batch of single
    frames spent 0.4 of its time there.
    """

    bias: Tensor | None = None  # (b, 1, 1, text), added to the scores

    def __call__(self, attn, x: Tensor, text: Tensor, *_) -> Tensor:
        q = attn.norm_q(attn.to_q(x)).unflatten(2, (attn.heads, -1)).transpose(1, 2)
        k = attn.norm_k(attn.to_k(text)).unflatten(2, (attn.heads, -1)).transpose(1, 2)
        v = attn.to_v(text).unflatten(2, (attn.heads, -1)).transpose(1, 2)
        scores = ((q.type_as(v) * v.shape[-1] ** -0.5) @ k.type_as(v).transpose(-1, -2)).float()
        weights = (scores if self.bias is None else scores + self.bias).softmax(-1)
        return attn.to_out[0]((weights.type_as(v) @ v).transpose(1, 2).flatten(2))


def has_fast_bfloat16(device: str) -> bool:
    """Whether the device has instructions for bfloat16 matrices: a CPU without them is faster in float32."""
    instructions = torch.cpu.get_capabilities() if torch.device(device).type == "cpu" else {"amx_bf16": True}
    return bool(instructions.get("amx_bf16") or instructions.get("avx512_bf16"))


def can_compile(device: str) -> bool:
    """Whether compiled blocks help: on a GPU, and on a CPU that is fast in bfloat16 and has a C++ compiler."""
    kind = torch.device(device).type
    return kind == "cuda" or (kind == "cpu" and has_fast_bfloat16(device) and shutil.which("g++") is not None)


def use_dense_attention(blocks: nn.ModuleList, device: str) -> None:
    """Give text-to-video blocks of Wan attention by matrix products where that is faster."""
    if torch.device(device).type == "cpu" and has_fast_bfloat16(device):
        for block in blocks:
            block.attn1.set_processor(DenseAttention())
            block.attn2.set_processor(CrossAttention())


def keep_freed_memory() -> None:
    """Let the process keep the memory that it frees, on Linux with the GNU C library; elsewhere nothing changes.

    Each large tensor otherwise gets new pages from the system, which clears them first: at 1,296 tokens that was a
    third of the backward pass.
    """
    mmap_max, trim_threshold, top_pad = -4, -1, -2  # from malloc.h
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, -1)
        libc.mallopt(top_pad, 2**28)


def optimize_blocks(blocks: nn.ModuleList, device: str) -> None:
    """Change Wan blocks in place so that they train faster: 1.8 times on two CPU cores with bfloat16."""
    use_dense_attention(blocks, device)
    if can_compile(device):
        torch._dynamo.config.recompile_limit = 64  # all networks of a class share it; each batch size needs a graph
        for block in blocks:
            block.compile(fullgraph=True, dynamic=False)
