"""LTX-Video: self-attention over the video alone, packed latents, guidance in one batch."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

from torch import Tensor, nn

from .base import Family, Grid


class LTX(Family):
    """The family of `LTXVideoTransformer3DModel`; its latents are (b, n, c)."""

    pipelines = ("LTXPipeline", "LTXImageToVideo", "LTXCondition")  # LTX-2 has other transformers, with sound
    fps = 24
    blocks = ("transformer_blocks",)
    attention = "attn1"
    latent_format = "BSC"
    batches_guidance = True

    def grid(self, model: nn.Module, x: Tensor, inputs: Mapping[str, Any]) -> Grid:
        """Token grid (f, h, w); one row of tokens where the pipeline gives coordinates instead."""
        grid = tuple(inputs.get(name) or 0 for name in ("num_frames", "height", "width"))
        return grid if prod(grid) == x.shape[1] else (1, 1, x.shape[1])

    def to_video(self, y: Tensor, grid: Grid) -> Tensor:
        """A velocity as a view (b, c, f, h, w)."""
        return y.unflatten(1, grid).permute(0, 4, 1, 2, 3)

    def from_video(self, y: Tensor) -> Tensor:
        """The velocity as (b, n, c)."""
        return y.flatten(2).transpose(1, 2)
