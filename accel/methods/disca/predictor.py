"""DisCa's predictor (arXiv 2602.05449): predicts the block stack's output from its input and a cached output."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ...students.weights import check_weights, load_weights, read_weights
from .predictor_manifest import PredictorForm, PredictorManifest

if TYPE_CHECKING:
    from ...families import Family


WEIGHTS = "model.safetensors"


class Predictor(nn.Module):
    """Current tokens and the cached feature -> two linear layers -> blocks like the model's own -> current feature.

    Form `paper` is the paper's. Form `residual` is ours: it adds its output to the cached feature, through a linear
    layer that is zero before training, so it starts as plain reuse. Form `guided-base` does so too, and is given the
    gap between the cached feature's noise level and the present one, to which its change is proportional.
    """

    def __init__(self, family: Family, model: nn.Module, form: PredictorForm, depth: int):
        super().__init__()
        d = family.hidden_size(model)
        self.fuse = nn.Sequential(nn.Linear(2 * d, d), nn.SiLU(), nn.Linear(d, d))
        self.blocks = nn.ModuleList(family.new_block(model) for _ in range(depth))
        self.gap = nn.Linear(1, d, bias=False) if form == "guided-base" else None
        self.out = nn.Linear(d, d) if form != "paper" else None
        if self.out is not None:
            nn.init.zeros_(self.out.weight)
            nn.init.zeros_(self.out.bias)

    def forward(self, hidden: Tensor, cached: Tensor, gap: Tensor, *inputs) -> Tensor:
        """The predicted output (b, n, d) of the block stack for tokens `hidden` (b, n, d).

        `cached` (b, n, d) is its output at the last full step, and `gap` (b,) how much sigma has fallen since, which
        only the form `guided-base` uses; `inputs` are the other inputs of the blocks.
        """
        y = self.fuse[0](torch.cat([hidden, cached.to(hidden.dtype)], -1))
        gap = gap.to(y)[:, None, None]
        if self.gap is not None:
            y = y + self.gap(gap)
        y = self.fuse[2](self.fuse[1](y))
        for block in self.blocks:
            y = block(y, *inputs)
        if self.out is None:
            return y
        change = self.out(y) if self.gap is None else gap * self.out(y)
        return cached.to(y.dtype) + change


def load_predictor(folder: Path, manifest: PredictorManifest, family: Family, model: nn.Module) -> Predictor:
    """The trained predictor in a folder, on the model's device and in its dtype."""
    with torch.random.fork_rng(devices=()):  # initialisation must not touch the global random state
        predictor = Predictor(family, model, manifest.form, manifest.depth)
    load_weights(predictor, read_weights(folder / WEIGHTS), f"{folder.name}/{WEIGHTS}")
    return predictor.to(model.device, model.dtype).eval().requires_grad_(False)


def num_parameters(folder: Path | None) -> int:
    """Number of parameters of the predictor in a folder; 0 if there is none."""
    file = folder and folder / WEIGHTS
    if not (file and file.is_file()):
        return 0
    check_weights(file)
    with safe_open(file, "pt") as tensors:
        return sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())
