"""Living textures: random fields over space and time that a caption names but does not determine.

Every texture is a value in [-1, 1] per pixel and frame; `render.py` turns it into colours between a darker and a
lighter tone of the background. A field is a sum of plane waves with integer wave numbers, so that it is the same at
any frame size, and the way its phases advance makes it drift, ripple or change.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

MAX_WAVE = 20  # the largest wave number of a field, in cycles per frame width


class Draw:
    """Random numbers of one scene's field seed, in a fixed order."""

    def __init__(self, seed: int):
        self.generator = torch.Generator().manual_seed(seed)

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        """Uniform numbers of any shape; without a shape, a scalar tensor."""
        return low + (high - low) * torch.rand(shape, generator=self.generator)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)


def render_texture(pattern: str, seed: int, time: Tensor, size: int, device: torch.device | str = "cpu") -> Tensor:
    """The texture (f, h, w) in [-1, 1] of a pattern of `TEXTURES` at the times (f,) in [0, 1]."""
    return TEXTURES[pattern](Draw(seed), time, size).clamp(-1, 1).to(device)


def random_field(draw: Draw, time: Tensor, size: int, amplitude: Callable, turns: Callable) -> Tensor:
    """A Gaussian field (f, h, w) of mean 0 and deviation 1, periodic over the frame.

    `amplitude(kx, ky)` is the mean strength of each plane wave, `turns(kx, ky)` the periods that it advances in the
    whole clip; both take and return tensors (2 MAX_WAVE + 1, MAX_WAVE + 1).
    """
    spectrum = _waves(draw, size, amplitude)
    ky, kx = _wave_numbers()
    spectrum = spectrum * torch.polar(torch.ones(()), 2 * math.pi * turns(kx, ky) * time[:, None, None])
    return torch.fft.irfft2(_in_rows(spectrum, size), s=(size, size), norm="forward")


def _wave_numbers() -> tuple[Tensor, Tensor]:
    return torch.arange(-MAX_WAVE, MAX_WAVE + 1.0)[:, None], torch.arange(0, MAX_WAVE + 1.0)[None, :]


def _in_rows(waves: Tensor, size: int) -> Tensor:
    """Waves (..., 2 MAX_WAVE + 1, MAX_WAVE + 1) in the rows (..., size, MAX_WAVE + 1) of a Fourier transform.

    Those that are finer than so many pixels can show are left out.
    """
    shown = min(MAX_WAVE, (size - 1) // 2)
    ky = torch.arange(-shown, shown + 1)
    rows = waves.new_zeros(*waves.shape[:-2], size, MAX_WAVE + 1)
    rows[..., ky % size, : shown + 1] = waves[..., ky + MAX_WAVE, : shown + 1]
    return rows


def _waves(draw: Draw, size: int, amplitude: Callable) -> Tensor:
    """Random complex amplitudes of all waves, for pixel centres; together of deviation 1."""
    ky, kx = _wave_numbers()
    strength = amplitude(kx, ky) * (kx.hypot(ky) > 0)
    strength = strength * (kx.hypot(ky) <= MAX_WAVE)
    random = torch.complex(draw.normal(*strength.shape), draw.normal(*strength.shape)) * strength
    both = torch.where(kx == 0, 1.0, 2.0)  # a wave with kx > 0 also stands for its mirror image
    random = random / (both * random.abs().square()).sum().sqrt()
    return random * torch.polar(torch.ones(()), math.pi * (kx + ky) / size)


def cloudy(draw: Draw, time: Tensor, size: int) -> Tensor:
    """Clouds of all sizes that drift with the wind and slowly change."""
    wind, angle = draw.uniform(0.12, 0.38), draw.uniform(-0.5, 0.5) + math.pi * draw.uniform(0, 1).round()
    steep, cover = draw.uniform(1.9, 2.3), draw.uniform(-0.15, 0.25)
    vx, vy = wind * angle.cos(), wind * angle.sin()
    change = draw.normal(2 * MAX_WAVE + 1, MAX_WAVE + 1)
    field = random_field(
        draw, time, size,
        lambda kx, ky: (kx.hypot(1.3 * ky) + 0.5) ** -steep,
        lambda kx, ky: kx * vx + ky * vy + 0.12 * change * kx.hypot(ky).sqrt(),
    )  # fmt: skip
    return 0.15 + 0.8 * (0.75 * field + cover - 0.1).tanh()


def starry(draw: Draw, time: Tensor, size: int) -> Tensor:
    """Stars that twinkle while the sky turns slowly past, over a faint nebula."""
    n = int(draw.uniform(50, 90))
    speed, angle = draw.uniform(0.05, 0.16), draw.uniform(0, 2 * math.pi)
    bright = draw.uniform(0.35, 1.0, n) ** 1.5
    radius = 0.011 + 0.006 * bright * draw.uniform(0.6, 1.2, n)  # in frame widths
    beat, phase = draw.uniform(0.8, 2.8, n), draw.uniform(0, 1, n)
    glow = bright * (0.68 + 0.32 * (2 * math.pi * (beat * time[:, None] + phase)).sin())  # (f, n)
    ramp = (torch.arange(size) + 0.5) / size
    profiles = []
    for start, velocity in ((draw.uniform(0, 1, n), speed * angle.cos()), (draw.uniform(0, 1, n), speed * angle.sin())):
        centre = start + velocity * time[:, None]
        away = (ramp - centre[..., None] + 0.5) % 1 - 0.5  # around the edge, so that stars never run out
        fall = (-0.5 * (away / radius[:, None]).square()).clamp(min=-20)  # no denormal numbers: they are slow
        profiles.append(fall.exp())  # (f, n, size)
    x, y = profiles
    stars = torch.einsum("fny,fnx->fyx", y * glow[..., None], x)
    nebula = random_field(
        draw, time, size,
        lambda kx, ky: (kx.hypot(ky) + 1) ** -2.5,
        lambda kx, ky: kx * speed * angle.cos() + ky * speed * angle.sin(),
    )  # fmt: skip
    return 0.16 * nebula - 0.15 + 1.25 * stars


def rippling(draw: Draw, time: Tensor, size: int) -> Tensor:
    """Light on moving water: bright lines where waves of many directions cross."""
    centre, pace = draw.uniform(2.2, 3.2), draw.uniform(0.7, 1.3)
    way = torch.where(draw.uniform(-1, 1, 2 * MAX_WAVE + 1, MAX_WAVE + 1) > 0, 1.0, -1.0)
    field = random_field(
        draw, time, size,
        lambda kx, ky: (-(((kx.hypot(0.6 * ky) - centre) / (0.35 * centre)).square())).exp(),
        lambda kx, ky: way * pace * (kx.hypot(ky) / centre).sqrt(),  # long waves run faster, as in deep water
    )  # fmt: skip
    return 1.05 * (-1.8 * (field.square() + 0.03).sqrt()).exp() - 0.35  # the root rounds the crests


def grassy(draw: Draw, time: Tensor, size: int) -> Tensor:
    """Blades of grass that sway in waves of wind; gusts pass over them as a sheen."""
    width, sway, rate = draw.uniform(7, 10.5), draw.uniform(0.018, 0.03), draw.uniform(0.9, 1.6)
    phase, tilt = draw.uniform(0, 1), draw.uniform(-0.6, 0.6)
    blades = _waves(
        draw, size, lambda kx, ky: (-(((kx - width) / 6).square()) - ((ky - tilt * 3) / 2.6).square()).exp()
    )
    _, kx = _wave_numbers()
    rows = torch.fft.ifft(_in_rows(blades, size), dim=0, norm="forward")  # (h, kx): each row can be moved by itself
    y = (torch.arange(size) + 0.5) / size
    wind = 2 * math.pi * (rate * time[:, None] - 0.7 * y + phase)
    bend = sway * (wind.sin() + 0.25 * (2 * wind + 1).sin())  # (f, h), in frame widths
    rows = rows * torch.polar(torch.ones(()), 2 * math.pi * kx * bend[..., None])
    grass = torch.fft.irfft(rows, n=size, dim=-1, norm="forward")
    gust = random_field(draw, time, size, lambda kx, ky: (kx.hypot(ky) + 0.5) ** -3, lambda kx, ky: 0.5 * kx + 0.3 * ky)
    return 0.32 * grass.tanh() + 0.3 * gust.tanh() + 0.05


def marbled(draw: Draw, time: Tensor, size: int) -> Tensor:
    """Veins of marble that flow slowly, folded by a turbulent field."""
    number, angle = draw.uniform(1.6, 2.8), draw.uniform(0, math.pi)
    fold, flow = draw.uniform(1.7, 2.6), draw.uniform(0.12, 0.3)
    change = draw.normal(2 * MAX_WAVE + 1, MAX_WAVE + 1)
    warp = random_field(
        draw, time, size,
        lambda kx, ky: (kx.hypot(ky) + 0.8) ** -3.2,
        lambda kx, ky: 0.1 * change * kx.hypot(ky).sqrt(),
    )  # fmt: skip
    ramp = (torch.arange(size) + 0.5) / size
    along = number * (angle.cos() * ramp[None, :] + angle.sin() * ramp[:, None])
    vein = (math.pi * (along - flow * time[:, None, None]) + fold * warp).sin().square().add(0.005).sqrt()
    return 0.65 * vein.sqrt() - 0.7 * (-5 * vein).exp() - 0.3


TEXTURES = {"cloudy": cloudy, "starry": starry, "rippling": rippling, "grassy": grassy, "marbled": marbled}
