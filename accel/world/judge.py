"""Reads a video back into the attributes of its caption, by geometry alone: no pretrained network.

The background is recognised first; what differs from it are the objects. An object's colour is a vote of its pixels,
its shape the best of six outlines laid over it, its motion and speed the path of its centre, radius and bright side.
An attribute that cannot be read is `None` and counts as wrong.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import AccelError
from .render import COLOURS, CYCLES, signed_distance
from .scene import ATTRIBUTES, PHRASES, SECOND_ATTRIBUTES, read_caption
from .segmentation import OBJECT_THRESHOLD, clean, find_background, grow, split_objects, texture_value, zoom
from .texture_stats import activity, contrast, nearest_texture, straight_line

FIT_THRESHOLD = 0.55  # overlap with the best outline below which there is no object
WAVE_THRESHOLD = 0.012  # amplitude of a regular pattern below which a background is plain
WAVE_SHARE = 0.2  # share of a regular pattern in the power of the mean image; true ones have .33 and more, textures .08
CONTRAST_THRESHOLD = 0.04  # of a living texture; true ones have .049 and more, plain backgrounds .031 with all shadows
ACTIVITY_THRESHOLD = 0.007  # change of a background's fine detail above which its texture is alive,
CHANGE_THRESHOLD = 0.2  # if the change is also more than this share of the detail: shadows move over stripes as well
SYMMETRY = {"circle": 0, "ring": 0, "square": 4, "cross": 4, "triangle": 3, "star": 5}
SIZE_THRESHOLD = 0.203  # mean radius in frame widths
SECOND_SIZE_THRESHOLD = 0.115
SMALL_THRESHOLD = 0.15  # radius below which a shape is read at double size
SPEED_THRESHOLDS = {"travel": 0.32, "turns": 0.85, "spin": 0.48, "hops": 2.0, "ratio": 1.95}


@dataclass(frozen=True)
class Track:
    """What was measured of an object, per frame: centre and radius in frame widths, angle in turns, (f,) each."""

    x: np.ndarray
    y: np.ndarray
    radius: np.ndarray
    angle: np.ndarray


@dataclass(frozen=True)
class Seen:
    """An object that was recognised; its radius is the mean over the clip, in frame widths."""

    shape: str
    colour: str
    radius: float
    track: Track


def read(frames: np.ndarray) -> dict[str, str | None]:
    """The attributes seen in frames (uint8, f h w c), those of a second object included.

    The value is `None` where nothing can be read, and for a second object that is not there.
    """
    video = torch.as_tensor(frames).float() / 255
    seen: dict[str, str | None] = dict.fromkeys((*ATTRIBUTES, *SECOND_ATTRIBUTES))
    planes = video.permute(3, 0, 1, 2)
    background, away = find_background(planes)
    if background is None:
        return seen
    everything = clean(away > OBJECT_THRESHOLD)
    seen["background"], seen["pattern"] = background, _pattern(video, texture_value(planes, background), everything)
    area = everything.float().mean((1, 2))
    if (area > 0.004).float().mean() < 0.7 or area.max() > 0.6:
        return seen
    first, second = _in_order([_read_object(video, away, mask) for mask in split_objects(everything)])
    if first is not None:
        size = "large" if first.radius > SIZE_THRESHOLD else "small"
        motion, speed = _motion(first.track)
        seen |= {"size": size, "colour": first.colour, "shape": first.shape, "motion": motion, "speed": speed}
    if second is not None:
        size = "large" if second.radius > SECOND_SIZE_THRESHOLD else "small"
        seen |= {"second_size": size, "second_colour": second.colour, "second_shape": second.shape}
    return seen


def score(frames: np.ndarray, caption: str) -> dict[str, float]:
    """1 or 0 for each attribute that the caption names, and their `mean`; empty if it names none.

    Raises AccelError for frames (f, h, w, c) that are not square, as all scenes of the world are.
    """
    height, width = frames.shape[1:3]
    if height != width:
        raise AccelError(f"the judge reads square videos, not {width}x{height}")
    asked, seen = read_caption(caption), read(frames)
    scores = {a: float(seen[a] == value) for a, value in asked.items()}
    return {**scores, "mean": sum(scores.values()) / len(scores)} if scores else {}


def _read_object(video: Tensor, away: Tensor, mask: Tensor) -> Seen | None:
    """What is seen of the object with a mask (f, h, w); `None` if it has no known shape."""
    shape, fit = _shape(_outline(away, mask))
    if fit < FIT_THRESHOLD:
        return None
    track = _track(video, mask, shape)
    if track.radius.mean() < SMALL_THRESHOLD:  # too few pixels to tell a cross from a square
        shape, _ = _shape(_outline(zoom(away, mask), zoom(mask, mask) > 0.5))
        track = _track(video, mask, shape)
    return Seen(shape, _colour(video, mask), float(track.radius.mean()), track)


def _in_order(objects: list[Seen | None]) -> tuple[Seen | None, Seen | None]:
    """The first and the second object: a second one is always smaller."""
    found = sorted((o for o in objects if o is not None), key=lambda o: -o.radius)
    return tuple((found + [None, None])[:2])


def _outline(away: Tensor, mask: Tensor) -> Tensor:
    """The mask (f, h, w) cut at half the height of its edge: where an edge is soft, its foot would round the shape."""
    peak = grow(away * mask)
    return clean(mask & (away > peak / 2))


def _pattern(video: Tensor, value: Tensor, mask: Tensor) -> str | None:
    """The regular pattern whose waves are the greater part of the mean image, or the living texture that is nearest.

    `value` (f, h, w) is what the background would be as a living texture. Plain, if there is neither. Objects that
    move fast can leave a flicker behind them, so movement alone makes no texture.
    """
    grown = grow(mask)
    weight = (1 - grown).sum(0)
    known = (weight > 0).float()
    if known.mean() < 0.2:
        return None
    light = video.mean(-1)
    image = (light * (1 - grown)).sum(0) / weight.clamp(min=1)
    rows = (image * known).sum(1) / known.sum(1).clamp(min=1)
    flat = (image - straight_line(rows)[:, None]) * known  # without the vertical gradient
    flat = flat - (flat.sum() / known.sum()) * known
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
    share = waves[best] ** 2 / 2 / max((flat.square().sum() / known.sum()).item(), 1e-9)
    if share < WAVE_SHARE and contrast(light, mask) > CONTRAST_THRESHOLD:
        change, of_detail = activity(light, mask)
        if change > ACTIVITY_THRESHOLD and of_detail > CHANGE_THRESHOLD:
            return nearest_texture(value, mask)
    return best if waves[best] > WAVE_THRESHOLD else "plain"


def _wave(flat: Tensor, known: Tensor, ramp: Tensor, fy: int, fx: int) -> float:
    """Amplitude of one plane wave in the known part of an image (h, w)."""
    phase = fy * ramp[:, None] + fx * ramp[None, :]
    return 2 * torch.complex((flat * phase.cos()).sum(), (flat * phase.sin()).sum()).abs().item() / known.sum().item()


def _centres(mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Centre x, centre y in [0, 1] and area (share of the frame) of a mask (f, h, w), (f,) each."""
    m = mask.float()
    ramp = (torch.arange(m.shape[-1]) + 0.5) / m.shape[-1]
    total = m.sum((1, 2)).clamp(min=1)
    return (m.sum(1) * ramp).sum(-1) / total, (m.sum(2) * ramp).sum(-1) / total, m.mean((1, 2))


def _unit_area(shape: str) -> float:
    """Area of a shape of unit radius."""
    ramp = torch.linspace(-1.4, 1.4, 281)
    return (signed_distance(shape, ramp[None, :], ramp[:, None]) < 0).float().mean().item() * 2.8**2


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
            inside = (signed_distance(shape, u, v) < 0).float()
            both = (inside * mask).sum((1, 2)) / torch.maximum(inside, mask).sum((1, 2)).clamp(min=1)
            best = torch.maximum(best, both)
        fits[shape] = best.mean().item()
    shape = max(fits, key=fits.get)
    return shape, fits[shape]


def _colour(video: Tensor, mask: Tensor) -> str:
    """The palette colour nearest in hue and saturation to most of the object's inner pixels."""
    inner = F.avg_pool2d(mask.float()[:, None], 3, 1, 1)[:, 0] > 0.99
    pixels = video[inner if inner.sum() > 20 else mask]
    pixels = pixels / pixels.norm(dim=-1, keepdim=True).clamp(min=1e-3)
    palette = torch.tensor(list(COLOURS.values()))
    votes = (pixels @ (palette / palette.norm(dim=-1, keepdim=True)).T).argmax(-1).bincount(minlength=len(palette))
    return list(COLOURS)[int(votes.argmax())]


def _track(video: Tensor, mask: Tensor, shape: str) -> Track:
    """The path of an object with a mask (f, h, w) in the video (f, h, w, 3); its angle is that of the bright side."""
    cx, cy, area = _centres(mask)
    ramp = (torch.arange(mask.shape[-1]) + 0.5) / mask.shape[-1]
    light = video.mean(-1)
    m = mask.float()
    lit = (light - ((light * m).sum((1, 2)) / m.sum((1, 2)).clamp(min=1))[:, None, None]) * m
    gx, gy = (lit.sum(1) * (ramp - cx[:, None])).sum(-1), (lit.sum(2) * (ramp - cy[:, None])).sum(-1)
    angle = np.unwrap(torch.atan2(gy, gx).numpy()) / (2 * math.pi)
    return Track(cx.numpy(), cy.numpy(), (area / UNIT_AREA[shape]).sqrt().numpy(), angle)


def _motion(track: Track) -> tuple[str | None, str | None]:
    """Motion and speed of a track; both `None` for an object that stays as it is."""
    n = max(1, len(track.x) // 12)
    ends = lambda v: (float(v[:n].mean()), float(v[-n:].mean()))
    (r0, r1), dx, dy = ends(track.radius), float(np.ptp(track.x)), float(np.ptp(track.y))
    pace = lambda value, kind: "quickly" if value > SPEED_THRESHOLDS[kind] else "slowly"
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
    """Length of the path of the centre, in frame widths."""
    return float(np.hypot(np.diff(track.x), np.diff(track.y)).sum())
