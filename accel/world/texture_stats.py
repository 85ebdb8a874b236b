"""How much the background of a video looks and moves like a living texture: its spectrum in space and time.

The statistics of a video are the logarithms of the shares of its power in bands of spatial frequency, orientation and
temporal frequency, and the spread, skewness and peakedness of the values. So a contrast that is too high or too low
changes one statistic and not all of them. True renders of a texture give their mean and
deviation; a video's distance to the texture is its root mean square deviation in these units. True renders have a
distance of about 1; blurred, frozen, flickering or wrongly patterned backgrounds have more.
"""

from __future__ import annotations

import functools
import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import AccelError
from ..files import atomic_write
from .render import render
from .scene import LIVING, sample_scene
from .segmentation import OBJECT_THRESHOLD, clean, distance_to_background, find_background, grow, texture_value

STORED = Path(__file__).with_name("texture_references.json")  # of the shipped model's size of video
BANDS = (0.5, 2, 4, 8, 16, 32)  # limits of the spatial bands, in cycles per frame width
TIME_BANDS = (-0.5, 0.5, 2.5, 8.5)  # limits of the temporal bands, in cycles per clip
FLOOR = 1e-4  # share of the power below which a band counts as empty: the rounding of the pixels has as much
REFERENCES = 16  # true renders of each texture
MIN_DEVIATION = 0.2  # of a statistic among true renders: 16 renders tell no smaller one apart


def texture_distance(frames: np.ndarray, pattern: str) -> float | None:
    """Distance of the background of frames (uint8, f h w c) to a living texture; `None` if no background is found.

    Raises AccelError for a pattern that is no living texture.
    """
    if pattern not in LIVING:
        raise AccelError(f"{pattern!r} is no living texture; these are {', '.join(LIVING)}")
    video = (torch.as_tensor(frames).float() / 255).permute(3, 0, 1, 2)
    background, away = find_background(video)
    if background is None:
        return None
    found = statistics_of(texture_value(video, background), clean(away > OBJECT_THRESHOLD))
    mean, deviation = references(*frames.shape[:2])[pattern]
    return ((found - mean) / deviation).square().mean().sqrt().item()


def nearest_texture(value: Tensor, mask: Tensor) -> str:
    """The living texture of which the values (f, h, w) outside a mask (f, h, w) are the likeliest."""
    found = statistics_of(value, mask)
    surprise = {
        pattern: (((found - mean) / deviation).square() / 2 + deviation.log()).sum().item()
        for pattern, (mean, deviation) in references(*value.shape[:2]).items()
    }
    return min(surprise, key=surprise.get)


def contrast(light: Tensor, mask: Tensor) -> float:
    """Standard deviation of a brightness (f, h, w) in [0, 1] outside a mask, without the vertical gradient."""
    weight = 1 - grow(mask, 9)
    total = weight.sum().clamp(min=1)
    rows = (light * weight).sum((0, 2)) / weight.sum((0, 2)).clamp(min=1)
    flat = light - straight_line(rows)[:, None]
    mean = (flat * weight).sum() / total
    return (((flat - mean).square() * weight).sum() / total).sqrt().item()


def straight_line(rows: Tensor) -> Tensor:
    """The straight line through the means of rows (h,)."""
    t = torch.linspace(-1, 1, len(rows))
    return rows.mean() + t * (t * rows).sum() / (t * t).sum()


def activity(light: Tensor, mask: Tensor) -> tuple[float, float]:
    """How much the fine detail of a brightness (f, h, w) in [0, 1] outside a mask changes over an eighth of the clip.

    The root mean square change, and its ratio to the detail itself. Fine detail leaves out the soft shadows, which
    move over a regular pattern as well.
    """
    fine = light - F.avg_pool2d(light[:, None], 7, 1, 3, count_include_pad=False)[:, 0]
    stride, weight = max(1, (len(light) - 1) // 8), 1 - grow(mask, 9)
    both = weight[stride:] * weight[:-stride]
    mean = lambda x: ((x * both).sum() / both.sum().clamp(min=1)).item()
    change, detail = mean((fine[stride:] - fine[:-stride]).square()), mean(fine[stride:].square())
    return change**0.5, (change / max(detail, 1e-8)) ** 0.5


def statistics_of(value: Tensor, mask: Tensor) -> Tensor:
    """The statistics (n,) of values (f, h, w) in [-1, 1] outside a mask (f, h, w)."""
    weight = 1 - grow(mask)
    weight = F.avg_pool2d(weight[:, None], 5, 1, 2)[:, 0] * weight  # a soft edge, which leaks less into other bands
    total = weight.sum().clamp(min=1)
    centred = value - (value * weight).sum() / total
    spread = ((centred.square() * weight).sum() / total).sqrt().clamp(min=1e-3)
    skewness, peak = (((centred / spread) ** p * weight).sum() / total for p in (3, 4))
    power = torch.fft.rfftn(centred * weight).abs().square() / (weight.square().sum().clamp(min=1) * value[0].numel())
    bands = _bands(*value.shape)
    share = torch.zeros(int(bands.max()) + 1).index_add_(0, bands.flatten(), power.flatten())[1:] / spread.square()
    moments = torch.stack([2 * spread.log(), skewness, peak.clamp(min=1e-3).log()])
    return torch.cat([(share + FLOOR).log(), moments])


@functools.lru_cache(4)
def _bands(frames: int, height: int, width: int) -> Tensor:
    """The band (f, h, w // 2 + 1) of each frequency of a real spectrum; 0: of none."""
    turns = torch.fft.fftfreq(frames, 1 / frames).abs()[:, None, None]
    ky, kx = torch.fft.fftfreq(height, 1 / height)[:, None], torch.fft.rfftfreq(width, 1 / width)[None, :]
    space = torch.bucketize(kx.hypot(ky), torch.tensor(BANDS, dtype=torch.float32))
    upright = (kx > ky.abs()).long()  # crests that run more up and down than across
    time = torch.bucketize(turns, torch.tensor(TIME_BANDS, dtype=torch.float32))
    inside = (space > 0) & (space < len(BANDS)) & (time < len(TIME_BANDS))
    return torch.where(inside, 1 + ((time - 1) * 2 + upright) * (len(BANDS) - 1) + space - 1, 0)


@functools.lru_cache(4)
def references(frames: int, size: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean and deviation (n,) of the statistics of true renders, by living texture.

    Those of the shipped model's videos are in a file: to measure them takes some ten seconds.
    """
    stored = json.loads(STORED.read_text())
    if [frames, size] != [stored["frames"], stored["size"]]:
        return measure_references(frames, size)
    return {pattern: tuple(map(torch.tensor, rows)) for pattern, rows in stored["references"].items()}


def measure_references(frames: int, size: int) -> dict[str, tuple[Tensor, Tensor]]:
    """What `references` returns, from new renders."""
    rng, made = random.Random("texture references"), {}
    for pattern in LIVING:
        rows = []
        for _ in range(REFERENCES):
            scene = replace(sample_scene(rng), pattern=pattern)
            video = (render(scene, frames, size).float() / 255).permute(3, 0, 1, 2)
            mask = clean(distance_to_background(video, scene.background) > OBJECT_THRESHOLD)
            rows.append(statistics_of(texture_value(video, scene.background), mask))
        rows = torch.stack(rows)
        made[pattern] = rows.mean(0), rows.std(0).clamp(min=MIN_DEVIATION)
    return made


def write_references(frames: int, size: int) -> None:
    """Measure the references of a size of video, and write the file: `python -m accel.world.texture_stats`."""
    found = {pattern: [row.tolist() for row in rows] for pattern, rows in measure_references(frames, size).items()}
    with atomic_write(STORED) as part:
        part.write_text(json.dumps({"frames": frames, "size": size, "references": found}) + "\n")


if __name__ == "__main__":
    write_references(17, 96)
