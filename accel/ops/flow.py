"""Flow matching along a line of noise levels: x at level s is (1 - s) x0 + s noise, its velocity noise - x0.

Letters: b batch, p pieces of a way; the other dimensions of x and v are any. Levels fall from 1 to 0.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def euler(x: Tensor, v: Tensor, now: Tensor, then: Tensor) -> Tensor:
    """x (b, ...) carried from level `now` (b,) to `then` (b,) along its velocity, first order."""
    return x + expand_like(then - now, x) * v


def mean_velocity(velocities: list[Tensor], levels: list[Tensor]) -> Tensor:
    """The velocity (b, ...) that alone leads as far as p pieces, each at its own velocity between two of p + 1 levels.

    A convex combination: the difference of two states, divided by a narrow step, would magnify their rounding.
    Pieces may be empty, but not all of them.
    """
    widths = torch.stack([now - then for now, then in zip(levels, levels[1:])])
    shares = (widths / widths.sum(0)).to(velocities[0])
    return sum(expand_like(share, v) * v for share, v in zip(shares, velocities))


def mean_flow_target(v: Tensor, slope: Tensor, now: Tensor, then: Tensor) -> Tensor:
    """What the mean velocity (b, ...) from level `now` (b,) to `then` (b,) should be: v - (now - then) du/dt.

    v is the velocity at `now`, `slope` the change of the mean with the level along the path. MeanFlow (Geng et al.,
    arXiv 2505.13447, eq. 6).
    """
    return v - expand_like(now - then, v) * slope


def jvp_exact(u: Callable[[Tensor, Tensor], Tensor], x: Tensor, now: Tensor, v: Tensor) -> Tensor:
    """du/dt (b, ...) of a mean velocity u(x, now) along the path with velocity v, by forward differentiation."""
    return torch.func.jvp(u, (x, now), (v, torch.ones_like(now)))[1]


def jvp_central(
    u: Callable[[Tensor, Tensor], Tensor], x: Tensor, now: Tensor, v: Tensor, then: Tensor, reach: float
) -> Tensor:
    """The same from two calls, `reach` above and below; from one side where the other lies beyond `then` or 1."""
    high, low = (now + reach).clamp(max=1), torch.maximum(now - reach, then)
    above, below = (u(x + expand_like(level - now, x) * v, level) for level in (high, low))
    return (above - below) / expand_like(high - low, x)


def expand_like(s: Tensor, x: Tensor) -> Tensor:
    """A number a sample (b,) in the shape and dtype of x (b, ...)."""
    return s.to(x).view(-1, *[1] * (x.ndim - 1))
