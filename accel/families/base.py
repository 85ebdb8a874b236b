"""What the host must know of a model family, as a typed protocol. One implementation a file; nobody else knows a model.

Letters: b batch, f frames, h w grid rows and columns, n tokens, m tokens that stay, k attention heads, d channels per
head (of hidden states: the width).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Protocol

from torch import Tensor, nn

from ..core.attention import QKV


class Family(Protocol):
    """Where things are in the pipelines and transformers of one family."""

    BLOCKS_ATTR: ClassVar[str]  # attribute of a transformer that holds its blocks
    STACKABLE: ClassVar[tuple[str, ...]]  # transformer classes that do nothing between two blocks

    def denoisers(self, pipe) -> list[nn.Module]:
        """The pipeline's transformers in the order of use."""

    def attentions(self, model: nn.Module) -> dict[str, nn.Module]:
        """Each block's video self-attention by the name of its layer."""

    def blocks(self, model: nn.Module) -> nn.ModuleList:
        """The stack of blocks; each maps (hidden (b, n, d), ...) to hidden (b, n, d)."""

    def new_block(self, model: nn.Module) -> nn.Module:
        """A block of the model's kind with fresh random weights."""

    def grid(self, model: nn.Module, x: Tensor) -> tuple[int, int, int]:
        """Token grid (f, h, w) of latents x, in raster order."""

    def hidden_size(self, model: nn.Module) -> int:
        """Width d of a token inside the blocks."""

    def is_guided(self, pipe) -> bool:
        """Whether the pipeline runs an unconditional branch in its current call."""

    def run_attention(self, attn: nn.Module, core: Callable[[QKV], Tensor], x: Tensor, *inputs) -> Tensor:
        """Output (b, n, d) of a self-attention on hidden x (b, n, d), with `core` in place of its softmax.

        `core` maps a `QKV` to (b, n, k, d), or to (b, m, k, d) where its `restore` was called. `inputs` are what the
        model's blocks pass to the attention after x.
        """
