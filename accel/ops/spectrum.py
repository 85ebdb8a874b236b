"""Low and high frequencies of a latent, in space and in time."""

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


def split(x: Tensor) -> tuple[Tensor, Tensor]:
    """Low and high band of x (..., h, w), float32, which sum to x; the radius is a fifth of the shorter side.

    FasterCache, arXiv 2410.19355, eq. 6-9. The transform is linear and the disc symmetric, so the bands of a difference
    can be computed once, cached as real tensors and added later without another transform.
    """
    x = x.float()
    h, w = x.shape[-2:]
    mask = low_pass(h, w, min(h, w) // 5, x.device)
    low = torch.fft.irfft2(torch.fft.rfft2(x) * mask, s=(h, w))
    return low, x - low


def high_pass(shape: tuple[int, int, int], space: float = 0.25, time: float = 0.5) -> tuple[Tensor, Tensor]:
    """Boolean masks (f, h, w // 2 + 1) of high spatial and of high temporal frequencies, in the layout of `rfftn`.

    `space` and `time` are thresholds as shares of an axis's highest frequency; the spatial frequency is the root mean
    square over both axes.
    """
    f, h, w = shape
    t, y = (2 * torch.fft.fftfreq(n).abs() for n in (f, h))
    x = 2 * torch.fft.rfftfreq(w)
    spatial = ((y[:, None].square() + x.square()) / 2).sqrt() > space
    return spatial.expand(f, -1, -1), (t > time)[:, None, None].expand(-1, h, w // 2 + 1)


def high_energy(x: Tensor, space: float = 0.25, time: float = 0.5) -> tuple[Tensor, Tensor]:
    """Mean square of x (..., f, h, w) in its high spatial and its high temporal frequencies, float32.

    By Parseval, with masks that select everything each would be the mean square of x itself.
    """
    f, h, w = x.shape[-3:]
    power = torch.fft.rfftn(x.float(), dim=(-3, -2, -1), norm="ortho").abs().square()
    twice = torch.full((w // 2 + 1,), 2.0, device=x.device)  # `rfftn` omits the mirrored half
    twice[0] = 1
    if w % 2 == 0:
        twice[-1] = 1
    masks = high_pass((f, h, w), space, time)
    return tuple((power * twice * m.to(x.device)).sum((-3, -2, -1)).mean() / (f * h * w) for m in masks)


def estimate_signal(x: Tensor, signal: float, noise: float) -> Tensor:
    """Estimate of the clean signal in noisy x (..., f, h, w), float32, by a Wiener filter whose gain has the mean 1.

    `signal` and `noise` are the scales of both in x; the signal's power falls as |frequency|^-3 along each axis.
    SeaCache (arXiv 2602.18993).
    """
    signal = max(signal, 1e-6)
    gains = []
    for axis in (-3, -2, -1):
        frequency = torch.fft.fftfreq(x.shape[axis], device=x.device).abs()
        gain = signal / (signal**2 + noise**2 * frequency**3)
        gains.append(gain / gain.mean())
    f, h, w = gains
    gain = f[:, None, None] * h[:, None] * w[: x.shape[-1] // 2 + 1]
    return torch.fft.irfftn(torch.fft.rfftn(x.float(), dim=(-3, -2, -1)) * gain, s=x.shape[-3:], dim=(-3, -2, -1))
