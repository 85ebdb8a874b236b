"""Flow matching along a line of noise levels: x at level s is (1 - s) x0 + s noise, its velocity noise - x0.

Letters: b batch, p pieces of a way; the other dimensions of x and v are any. Levels fall from 1 to 0.
"""

from __future__ import annotations

import torch
from torch import Tensor


def euler(x: Tensor, v: Tensor, now: Tensor, then: Tensor) -> Tensor:
    """x (b, ...) carried from level `now` (b,) to `then` (b,) along its velocity, first order."""
    return x + (then - now).to(x).view(-1, *[1] * (x.ndim - 1)) * v


def mean_velocity(velocities: list[Tensor], levels: list[Tensor]) -> Tensor:
    """The velocity (b, ...) that alone leads as far as p pieces, each at its own velocity between two of p + 1 levels.

    A convex combination: the difference of two states, divided by a narrow step, would magnify their rounding.
    Pieces may be empty, but not all of them.
    """
    widths = torch.stack([now - then for now, then in zip(levels, levels[1:])])
    shares = (widths / widths.sum(0)).to(velocities[0])
    return sum(share.view(-1, *[1] * (v.ndim - 1)) * v for share, v in zip(shares, velocities))
