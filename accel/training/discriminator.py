"""Discriminator between features after a full step and after a predicted one (hinge loss, several scales)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from ..ops.flow import expand_like

SCALES = (1, 2, 4)  # of the spatial pooling
HIDDEN = 64


class Discriminator(nn.Module):
    """Three spectrally normalised convolutions per layer, applied to its feature at several spatial scales."""

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
        """Logits (b, positions) for each layer and scale, from the layers' features (b, n, d) on a token grid."""
        logits = []
        for head, feature in zip(self.heads, features, strict=True):
            x = feature.float().transpose(1, 2).unflatten(2, grid)
            x = x / expand_like(x.detach().flatten(1).std(1).clamp(min=1e-6), x)  # magnitudes differ between layers
            for scale in SCALES:
                if scale <= min(grid[1:]):
                    logits.append(head(F.avg_pool3d(x, (1, scale, scale))).flatten(1))
        return logits


def hinge(logits: list[Tensor], real: bool, weights: Tensor) -> Tensor:
    """Hinge loss: mean of max(0, 1 - logit) if the features count as real, else of max(0, 1 + logit).

    The mean is over layers and scales, and over samples by their weights (b,); weight 0 leaves a sample out.
    """
    sign = -1.0 if real else 1.0
    return torch.stack([(F.relu(1 + sign * logit).mean(1) * weights).sum() for logit in logits]).mean()


def accuracy(logits: list[Tensor], real: bool, weights: Tensor) -> float:
    """Fraction of logits with the correct sign, over samples by their weights (b,)."""
    return (torch.cat([((logit > 0) == real).float() for logit in logits], 1).mean(1) * weights).sum().item()
