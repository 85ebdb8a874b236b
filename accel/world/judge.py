"""Reads a video back into the attributes of its caption, by geometry alone: no pretrained network.

The background is recognised first; what differs from it is the thing. Its colour is a vote of its pixels, its shape
the best of six outlines laid over it, its motion and speed the path of its centre, radius and bright side.
An attribute that cannot be read is `None` and counts as wrong.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .render import BACKGROUNDS, COLOURS, CYCLES, distance
from .scene import ATTRIBUTES, PHRASES, read_caption

LIGHT = 0.17  # how far pattern and gradient may shift a background's brightness
FAR = 0.13  # a pixel further than this from the background's colours belongs to the thing
FIT = 0.55  # overlap with the best outline below which there is no thing
SYMMETRY = {"circle": 0, "ring": 0, "square": 4, "cross": 4, "triangle": 3, "star": 5}
BETWEEN_SIZES = 0.203  # mean radius in widths
BETWEEN_SPEEDS = {"travel": 0.32, "turns": 0.85, "spin": 0.48, "hops": 2.0, "ratio": 1.95}


@dataclass(frozen=True)
class Track:
    """What was measured of the thing, per frame: centre and radius in widths, angle in turns, (f,) each."""

    x: np.ndarray
    y: np.ndarray
    radius: np.ndarray
    angle: np.ndarray


def read(frames: np.ndarray) -> dict[str, str | None]:
    """The seven attributes seen in frames (uint8, f h w c); `None` where nothing can be read."""
    video = torch.as_tensor(frames).float() / 255
    seen: dict[str, str | None] = dict.fromkeys(ATTRIBUTES)
    background, away = _background(video)
    if background is None:
        return seen
    mask = _clean(away > FAR)
    seen["background"], seen["pattern"] = background, _pattern(video, mask)
    area = mask.float().mean((1, 2))
    if (area > 0.004).float().mean() < 0.7 or area.max() > 0.6:
        return seen
    shape, fit = _shape(_outline(away, mask))
    if fit < FIT:
        return seen
    track = _track(video, mask, shape)
    seen["shape"], seen["colour"] = shape, _colour(video, mask)
    seen["size"] = "large" if track.radius.mean() > BETWEEN_SIZES else "small"
    seen["motion"], seen["speed"] = _motion(track)
    return seen


def score(frames: np.ndarray, caption: str) -> dict[str, float]:
    """1 or 0 for each attribute that the caption names, and their `mean`; empty if it names none."""
    asked, seen = read_caption(caption), read(frames)
    marks = {a: float(seen[a] == value) for a, value in asked.items()}
    return {**marks, "mean": sum(marks.values()) / len(marks)} if marks else {}


def _background(video: Tensor) -> tuple[str | None, Tensor]:
    """The background whose line of brightness passes near most pixels, and each pixel's distance (f, h, w) to it."""
    best, name, away = 0.0, None, video[..., 0]
    for candidate, colour in BACKGROUNDS.items():
        offset = video - torch.tensor(colour)
        light = offset.mean(-1, keepdim=True).clamp(-LIGHT, LIGHT)
        far = (offset - light).norm(dim=-1)
        share = (far < 0.5 * FAR).float().mean().item()
        if share > best:
            best, name, away = share, candidate, far
    return (name if best > 0.35 else None), away


def _clean(mask: Tensor) -> Tensor:
    """The mask (f, h, w) without specks: a majority vote of each 3x3 neighbourhood."""
    return F.avg_pool2d(mask.float()[:, None], 3, 1, 1)[:, 0] > 0.5


def _outline(away: Tensor, mask: Tensor) -> Tensor:
    """The mask (f, h, w) cut at half the height of its edge: where an edge is soft, its foot would round the shape."""
    peak = F.max_pool2d((away * mask)[:, None], 5, 1, 2)[:, 0]
    return _clean(mask & (away > peak / 2))


def _pattern(video: Tensor, mask: Tensor) -> str | None:
    """The pattern with the strongest wave over the background's mean image; plain if there is none."""
    grown = F.max_pool2d(mask.float()[:, None], 5, 1, 2)[:, 0]
    weight = (1 - grown).sum(0)
    image = (video.mean(-1) * (1 - grown)).sum(0) / weight.clamp(min=1)
    known = (weight > 0).float()
    if known.mean() < 0.2:
        return None
    rows = (image * known).sum(1, keepdim=True) / known.sum(1, keepdim=True).clamp(min=1)
    flat = (image - _smooth(rows)) * known  # without the vertical gradient
    size = image.shape[-1]
    ramp = 2 * math.pi * (torch.arange(size) + 0.5) / size
    power = lambda fy, fx: _wave(flat, known, ramp, fy, fx)
    c = CYCLES["checked"]
    d = CYCLES["dotted"]
    waves = {
        "striped": power(CYCLES["striped"], 0),
        "checked": math.hypot(power(c, c), power(c, -c)),
        "dotted": math.hypot(power(d, 0), power(0, d)),
    }
    best = max(waves, key=waves.get)
    return best if waves[best] > 0.012 else "plain"


def _smooth(rows: Tensor) -> Tensor:
    """The straight line through a column of row means (h, 1)."""
    t = torch.linspace(-1, 1, len(rows))[:, None]
    return rows.mean() + t * (t * rows).sum() / (t * t).sum()


def _wave(flat: Tensor, known: Tensor, ramp: Tensor, fy: int, fx: int) -> float:
    """Amplitude of one plane wave in the known part of an image (h, w)."""
    phase = fy * ramp[:, None] + fx * ramp[None, :]
    flat = flat - (flat.sum() / known.sum()) * known
    return 2 * torch.complex((flat * phase.cos()).sum(), (flat * phase.sin()).sum()).abs().item() / known.sum().item()


def _centres(mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Centre x, centre y in [0, 1] and area (share of the frame) of a mask (f, h, w), (f,) each."""
    m = mask.float()
    ramp = (torch.arange(m.shape[-1]) + 0.5) / m.shape[-1]
    total = m.sum((1, 2)).clamp(min=1)
    return (m.sum(1) * ramp).sum(-1) / total, (m.sum(2) * ramp).sum(-1) / total, m.mean((1, 2))


def _unit_area(shape: str) -> float:
    ramp = torch.linspace(-1.4, 1.4, 281)
    return (distance(shape, ramp[None, :], ramp[:, None]) < 0).float().mean().item() * 2.8**2


UNIT_AREA = {shape: _unit_area(shape) for shape in PHRASES["shape"]}


def _shape(mask: Tensor) -> tuple[str, float]:
    """The outline that overlaps the mask best, at the mask's own centre and area and any angle; and the overlap."""
    cx, cy, area = _centres(mask)
    largest = area.argsort(descending=True)[: max(4, len(area) // 2)]
    cx, cy, area, mask = cx[largest], cy[largest], area[largest].clamp(min=1e-4), mask[largest].float()
    ramp = (torch.arange(mask.shape[-1]) + 0.5) / mask.shape[-1]
    dx, dy = (ramp - cx[:, None])[:, None, :], (ramp - cy[:, None])[:, :, None]
    fits = {}
    for shape, order in SYMMETRY.items():
        radius = (area / UNIT_AREA[shape]).sqrt()[:, None, None]
        best = torch.zeros(len(area))
        for i in range(8 if order else 1):
            angle = 2 * math.pi * i / (8 * max(order, 1))
            u = (math.cos(angle) * dx + math.sin(angle) * dy) / radius
            v = (math.cos(angle) * dy - math.sin(angle) * dx) / radius
            inside = (distance(shape, u, v) < 0).float()
            both = (inside * mask).sum((1, 2)) / torch.maximum(inside, mask).sum((1, 2)).clamp(min=1)
            best = torch.maximum(best, both)
        fits[shape] = best.mean().item()
    shape = max(fits, key=fits.get)
    return shape, fits[shape]


def _colour(video: Tensor, mask: Tensor) -> str:
    """The palette colour nearest in hue and saturation to most of the thing's inner pixels."""
    inner = F.avg_pool2d(mask.float()[:, None], 3, 1, 1)[:, 0] > 0.99
    pixels = video[inner if inner.sum() > 20 else mask]
    pixels = pixels / pixels.norm(dim=-1, keepdim=True).clamp(min=1e-3)
    palette = torch.tensor(list(COLOURS.values()))
    votes = (pixels @ (palette / palette.norm(dim=-1, keepdim=True)).T).argmax(-1).bincount(minlength=len(palette))
    return list(COLOURS)[int(votes.argmax())]


def _track(video: Tensor, mask: Tensor, shape: str) -> Track:
    cx, cy, area = _centres(mask)
    ramp = (torch.arange(mask.shape[-1]) + 0.5) / mask.shape[-1]
    light = video.mean(-1)
    m = mask.float()
    lit = (light - ((light * m).sum((1, 2)) / m.sum((1, 2)).clamp(min=1))[:, None, None]) * m
    gx, gy = (lit.sum(1) * (ramp - cx[:, None])).sum(-1), (lit.sum(2) * (ramp - cy[:, None])).sum(-1)
    angle = np.unwrap(torch.atan2(gy, gx).numpy()) / (2 * math.pi)
    return Track(cx.numpy(), cy.numpy(), (area / UNIT_AREA[shape]).sqrt().numpy(), angle)


def _motion(track: Track) -> tuple[str | None, str | None]:
    """Motion and speed of a track; both `None` for a thing that stays as it is."""
    n = max(1, len(track.x) // 12)
    ends = lambda v: (float(v[:n].mean()), float(v[-n:].mean()))
    (r0, r1), dx, dy = ends(track.radius), float(np.ptp(track.x)), float(np.ptp(track.y))
    pace = lambda value, kind: "quickly" if value > BETWEEN_SPEEDS[kind] else "slowly"
    if max(dx, dy) < 0.10:
        ratio = max(r0, r1) / max(min(r0, r1), 1e-3)
        if ratio > 1.22:
            return ("grows" if r1 > r0 else "shrinks"), pace(ratio, "ratio")
        turns = abs(track.angle[-1] - track.angle[0])
        return ("spins", pace(turns, "spin")) if turns > 0.15 else (None, None)
    if min(dx, dy) > 0.12 and min(dx, dy) > 0.4 * max(dx, dy):
        return "orbits", pace(_path(track) / (2 * math.pi * 0.21), "turns")
    if dx > dy:
        x0, x1 = ends(track.x)
        return ("right" if x1 > x0 else "left"), pace(dx, "travel")
    y0, y1 = ends(track.y)
    if dy > 1.5 * abs(y1 - y0):
        return "bounces", pace(_path(track) / (2 * max(dy, 0.1)), "hops")
    return ("down" if y1 > y0 else "up"), pace(dy, "travel")


def _path(track: Track) -> float:
    """Length of the way of the centre, in widths."""
    return float(np.hypot(np.diff(track.x), np.diff(track.y)).sum())
