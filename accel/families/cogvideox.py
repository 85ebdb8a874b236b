"""CogVideoX (2B, 5B, 1.5; also from images and videos): joint attention, the text first; guidance in one batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .base import Family, Grid


class CogVideoX(Family):
    """The family of `CogVideoXTransformer3DModel`; its latents are (b, f, c, h, w)."""

    pipelines = ("CogVideoX",)
    fps = 8
    blocks = ("transformer_blocks",)
    attention = "attn1"
    latent_format = "BFCHW"
    is_joint = True
    batches_guidance = True
    remarks = {"fittedsolver": "no; its schedulers are not for flow matching"}

    def to_video(self, y: Tensor, grid: Grid) -> Tensor:
        """A velocity as a view (b, c, f, h, w)."""
        return y.transpose(1, 2)

    def from_video(self, y: Tensor) -> Tensor:
        """The velocity as (b, f, c, h, w)."""
        return y.transpose(1, 2)

    def is_guided(self, pipe, call: Mapping[str, Any]) -> bool:
        """Whether the batch has an unconditional half."""
        return bool(call.get("do_classifier_free_guidance", pipe.guidance_scale > 1))

    def video_tokens(self, sequence: int, video: int) -> slice:
        """The last ones: the text comes first."""
        return slice(sequence - video, sequence)
