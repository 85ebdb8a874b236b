"""SkyReels-V2: Wan's architecture with classes of its own; guidance in two calls."""

from __future__ import annotations

from .base import Family


class SkyReelsV2(Family):
    """The family of `SkyReelsV2Transformer3DModel`."""

    pipelines = ("SkyReelsV2",)
    fps = 24
    blocks = ("blocks",)
    attention = "attn1"
