"""Flow matching on straight paths: x at sigma s is (1 - s) x0 + s noise, its velocity noise - x0.

Letters: b batch; the other dimensions of x and v are any. As in MeanFlow, t is where a step begins and r where it
ends; sigmas fall from 1 to 0, so r <= t.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def euler(x: Tensor, v: Tensor, t: Tensor, r: Tensor) -> Tensor:
    """x (b, ...) moved from sigma t (b,) to sigma r (b,) along its velocity v, first order."""
    return x + expand_like(r - t, x) * v


def mean_velocity(velocities: list[Tensor], sigmas: list[Tensor]) -> Tensor:
    """The mean (b, ...) of p velocities, weighted by the widths of the intervals between p + 1 sigmas.

    One Euler step with it ends where the p Euler steps end.

    Computed as a convex combination: the difference of two states divided by a small step would amplify their
    rounding. Intervals may be empty, but not all of them.
    """
    widths = torch.stack([t - r for t, r in zip(sigmas, sigmas[1:])])
    shares = (widths / widths.sum(0)).to(velocities[0])
    return sum(expand_like(share, v) * v for share, v in zip(shares, velocities))


def mean_flow_target(v: Tensor, jvp: Tensor, t: Tensor, r: Tensor) -> Tensor:
    """The target of the mean velocity u (b, ...) from sigma t (b,) to r (b,): v - (t - r) du/dt.

    v is the velocity at t, `jvp` the derivative du/dt of the mean velocity along the path. MeanFlow (Geng et al.,
    arXiv 2505.13447, eq. 6).
    """
    return v - expand_like(t - r, v) * jvp


def jvp_exact(u: Callable[[Tensor, Tensor], Tensor], x: Tensor, t: Tensor, v: Tensor) -> Tensor:
    """du/dt (b, ...) of a mean velocity u(x, t) along the path with velocity v, by forward-mode differentiation."""
    return torch.func.jvp(u, (x, t), (v, torch.ones_like(t)))[1]


def jvp_central(
    u: Callable[[Tensor, Tensor], Tensor], x: Tensor, t: Tensor, v: Tensor, r: Tensor, eps: float
) -> Tensor:
    """du/dt (b, ...) as a central difference of two calls at t +- eps; one-sided where one lies above 1 or below r."""
    high, low = (t + eps).clamp(max=1), torch.maximum(t - eps, r)
    above, below = (u(x + expand_like(sigma - t, x) * v, sigma) for sigma in (high, low))
    return (above - below) / expand_like(high - low, x)


def expand_like(s: Tensor, x: Tensor) -> Tensor:
    """One number per sample (b,) in the dtype of x (b, ...), shaped to broadcast over it."""
    return s.to(x).view(-1, *[1] * (x.ndim - 1))
