"""What methods will hold in memory on real models at their usual sizes, computed from the shapes alone."""

from __future__ import annotations

from types import SimpleNamespace
from typing import NamedTuple

import torch

from ..families import FAMILIES, Family
from ..methods import METHODS
from ..methods.base import RunSpec

STEPS = 50
SETTINGS = {
    "`fastercache`": METHODS["fastercache"](),
    "`asymrnr`": METHODS["asymrnr"](),
    "`asymrnr`, uncorrected": METHODS["asymrnr"](correction="none"),
    "`disca`, `taylor-1`": METHODS["disca"](predictor="taylor-1"),
    "`stepcache`": METHODS["stepcache"](),
}


class Shape(NamedTuple):
    """A model's architecture and usual size."""

    pipelines: str  # beginning of the class name
    size: str
    layers: int
    heads: int
    head_dim: int
    latents: tuple[int, int, int, int]  # (c, f, h, w)
    grid: tuple[int, int, int]
    text: int = 0  # tokens in joint attention
    guided: bool = True


SHAPES = {
    "Wan 2.1 1.3B": Shape("Wan", "832x480, 81 frames", 30, 12, 128, (16, 21, 60, 104), (21, 30, 52)),
    "Wan 2.1 14B": Shape("Wan", "1280x720, 81 frames", 40, 40, 128, (16, 21, 90, 160), (21, 45, 80)),
    "CogVideoX 2B": Shape("CogVideoX", "720x480, 49 frames", 30, 30, 64, (16, 13, 60, 90), (13, 30, 45), 226),
    "CogVideoX 5B": Shape("CogVideoX", "720x480, 49 frames", 42, 48, 64, (16, 13, 60, 90), (13, 30, 45), 226),
    "HunyuanVideo": Shape(
        "HunyuanVideo", "1280x720, 129 frames", 60, 24, 128, (16, 33, 90, 160), (33, 45, 80), 256, guided=False
    ),
    "LTX-Video": Shape("LTXPipeline", "704x480, 161 frames", 28, 32, 64, (128, 21, 15, 22), (21, 15, 22)),
    "Mochi": Shape("Mochi", "848x480, 163 frames", 48, 24, 128, (12, 28, 60, 106), (28, 30, 53), 256),
}


def forecast(shape: Shape) -> dict[str, float]:
    """GiB that each setting will hold at most, in bfloat16, for one video of 50 steps."""
    spec = _spec(shape)
    return {name: method.estimate_memory(spec) / 2**30 for name, method in SETTINGS.items()}


def _spec(shape: Shape) -> RunSpec:
    config = SimpleNamespace(num_attention_heads=shape.heads, attention_head_dim=shape.head_dim)
    model = SimpleNamespace(config=config, blocks=[], transformer_blocks=[], single_transformer_blocks=[])
    latents = torch.empty(1, *shape.latents, dtype=torch.bfloat16, device="meta")
    return RunSpec(model, _family(shape), latents, shape.grid, STEPS, shape.guided, shape.layers, shape.text)


def _family(shape: Shape) -> Family:
    return next(family for family in FAMILIES if shape.pipelines in family.pipelines)
