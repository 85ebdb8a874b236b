"""Mochi: joint attention with the video first, guidance in one batch, timesteps that rise."""

from __future__ import annotations

from .base import Family


class Mochi(Family):
    """The family of `MochiTransformer3DModel`."""

    pipelines = ("Mochi",)
    fps = 30
    blocks = ("transformer_blocks",)
    attention = "attn1"
    is_joint = True
    batches_guidance = True
