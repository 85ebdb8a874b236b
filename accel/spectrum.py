"""Low and high spatial frequencies of a latent, per frame and channel."""

from __future__ import annotations

import torch
from torch import Tensor


def low_pass(h: int, w: int, radius: int, device: torch.device | str = "cpu") -> Tensor:
    """Boolean mask (h, w // 2 + 1) of the frequencies within `radius`, in the layout of `rfft2`.

    Coordinates are integers: in floating point, bins that lie exactly on the radius fall on either side.
    """
    y = torch.arange(h, device=device)
    y = torch.minimum(y, h - y)
    x = torch.arange(w // 2 + 1, device=device)
    return y[:, None] ** 2 + x[None, :] ** 2 <= radius**2


def split(x: Tensor, radius: int | None = None) -> tuple[Tensor, Tensor]:
    """Low and high band of x (..., h, w), float32, which sum to x; the radius is a fifth of the shorter side.

    FasterCache, arXiv 2410.19355, eq. 6-9. Because the transform is linear and the disc symmetric, the bands of a
    difference can be split once, kept as real tensors and added later without another transform.
    """
    x = x.float()
    h, w = x.shape[-2:]
    mask = low_pass(h, w, min(h, w) // 5 if radius is None else radius, x.device)
    low = torch.fft.irfft2(torch.fft.rfft2(x) * mask, s=(h, w))
    return low, x - low
