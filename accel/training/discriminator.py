"""Tells features of a model apart: those behind its own step, and those behind a predicted one (hinge, many scales)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from ..ops.flow import expand_like

SCALES = (1, 2, 4)  # of the spatial pooling
HIDDEN = 64


class Discriminator(nn.Module):
    """For each of some layers three spectrally normalised convolutions, which see it at every scale."""

    def __init__(self, width: int, layers: int):
        super().__init__()
        self.heads = nn.ModuleList(
            nn.Sequential(
                spectral_norm(nn.Conv3d(width, HIDDEN, 1)), nn.LeakyReLU(0.2),
                spectral_norm(nn.Conv3d(HIDDEN, HIDDEN, 3, padding=1)), nn.LeakyReLU(0.2),
                spectral_norm(nn.Conv3d(HIDDEN, 1, 1)),
            )
            for _ in range(layers)
        )  # fmt: skip

    def forward(self, features: list[Tensor], grid: tuple[int, int, int]) -> list[Tensor]:
        """Logits (b, positions) of each layer and scale, for outputs (b, n, d) of the layers on a grid of tokens."""
        logits = []
        for head, feature in zip(self.heads, features, strict=True):
            x = feature.float().transpose(1, 2).unflatten(2, grid)
            x = x / expand_like(x.detach().flatten(1).std(1).clamp(min=1e-6), x)  # layers differ in size by orders
            for scale in SCALES:
                if scale <= min(grid[1:]):
                    logits.append(head(F.avg_pool3d(x, (1, scale, scale))).flatten(1))
        return logits


def hinge(logits: list[Tensor], real: bool, shares: Tensor) -> Tensor:
    """Mean of max(0, 1 - logit) where they should be taken for real, else of max(0, 1 + logit).

    Over layers, scales, and samples by their shares (b,); 0 leaves one out.
    """
    sign = -1.0 if real else 1.0
    return torch.stack([(F.relu(1 + sign * own).mean(1) * shares).sum() for own in logits]).mean()


def accuracy(logits: list[Tensor], real: bool, shares: Tensor) -> float:
    """How many of the logits are on the right side of zero, over samples by their shares (b,)."""
    return (torch.cat([((own > 0) == real).float() for own in logits], 1).mean(1) * shares).sum().item()
