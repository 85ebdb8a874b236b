"""DisCa's predictor (arXiv 2602.05449): what the stack of blocks would give, from its input and an older output."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from ...families import Family

PredictorForm = Literal["residual", "paper"]


class Predictor(nn.Module):
    """Current tokens and the cached feature -> two linear layers -> blocks of the model's own kind -> the feature now.

    `plain` is the paper's. `residual` adds what it gives, through a linear layer that is zero at first, to the cached
    feature: it starts exactly as reuse.
    """

    def __init__(self, family: Family, model: nn.Module, form: PredictorForm, depth: int):
        super().__init__()
        d = family.hidden_size(model)
        self.fuse = nn.Sequential(nn.Linear(2 * d, d), nn.SiLU(), nn.Linear(d, d))
        self.blocks = nn.ModuleList(family.new_block(model) for _ in range(depth))
        self.out = nn.Linear(d, d) if form == "residual" else None
        if self.out is not None:
            nn.init.zeros_(self.out.weight)
            nn.init.zeros_(self.out.bias)

    def forward(self, hidden: Tensor, cached: Tensor, *inputs) -> Tensor:
        """The last block's output (b, n, d) for tokens `hidden` (b, n, d), an older such output, and its inputs."""
        y = self.fuse(torch.cat([hidden, cached.to(hidden.dtype)], -1))
        for block in self.blocks:
            y = block(y, *inputs)
        return y if self.out is None else cached.to(y.dtype) + self.out(y)


def flops(predictor: Predictor, tokens: int, block: int) -> int:
    """FLOPs of a call on so many tokens (b n), one of whose blocks takes `block`."""
    layers = [m for m in (*predictor.fuse, predictor.out) if isinstance(m, nn.Linear)]
    return len(predictor.blocks) * block + sum(2 * tokens * layer.weight.numel() for layer in layers)
