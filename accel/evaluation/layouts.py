"""Real models with random weights: their classes in diffusers, whose defaults are mostly the published configurations.

On the meta device they have shapes alone.
"""

from __future__ import annotations

import inspect
from contextlib import nullcontext
from typing import NamedTuple

import diffusers
import torch
from diffusers.models.modeling_utils import no_init_weights
from torch import nn


class Layout(NamedTuple):
    """A model by its classes, and what differs from their defaults in its configuration and in its usual size."""

    pipeline: str
    transformer: str
    config: dict = {}
    size: dict = {}


LAYOUTS = {
    "Wan 2.1 1.3B": Layout(
        "WanPipeline", "WanTransformer3DModel", {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}
    ),
    "Wan 2.1 14B, 480p": Layout("WanPipeline", "WanTransformer3DModel"),
    "Wan 2.1 14B, 720p": Layout("WanPipeline", "WanTransformer3DModel", size={"height": 720, "width": 1280}),
    "CogVideoX 2B": Layout("CogVideoXPipeline", "CogVideoXTransformer3DModel"),
    "CogVideoX 5B": Layout(
        "CogVideoXPipeline", "CogVideoXTransformer3DModel",
        {"num_attention_heads": 48, "num_layers": 42, "use_rotary_positional_embeddings": True},
    ),
    "HunyuanVideo": Layout("HunyuanVideoPipeline", "HunyuanVideoTransformer3DModel"),
    "LTX-Video": Layout("LTXPipeline", "LTXVideoTransformer3DModel"),
    "Mochi": Layout("MochiPipeline", "MochiTransformer3DModel", size={"frames": 163}),
}  # fmt: skip


def build(layout: Layout, device: str, scheduler=None, **config) -> diffusers.DiffusionPipeline:
    """A pipeline of a transformer in bfloat16 and nothing else; `config` replaces values of the layout's."""
    with torch.device(device), no_init_weights() if device == "meta" else nullcontext():
        transformer = getattr(diffusers, layout.transformer)(**{**layout.config, **config}).eval()
    to_bfloat16(transformer)
    kind = getattr(diffusers, layout.pipeline)
    parameters = inspect.signature(kind).parameters.values()
    absent = {p.name: None for p in parameters if p.default is inspect.Parameter.empty}
    pipe = kind(**absent | {"transformer": transformer, "scheduler": scheduler})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def to_bfloat16(model: nn.Module) -> None:
    """Convert the weights as loading does: what the class wants in float32 stays so."""
    kept = set(model._keep_in_fp32_modules or ())
    for name, weights in model.named_parameters():
        if kept.isdisjoint(name.split(".")):
            weights.data = weights.data.bfloat16()
