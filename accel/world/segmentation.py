"""Splits a video into background and objects: which background it is, which pixels differ from it, and whose they are.

Every background has a set of colours that lie on lines: its colour made evenly brighter or darker (regular patterns),
and its tones from dark to light (living textures). A pixel far from all of them belongs to an object.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from skimage.measure import label
from torch import Tensor

from .render import BACKGROUNDS, DARKER, LIGHTER

LIGHT_THRESHOLD = 0.17  # how far a regular pattern and the gradient may shift a background's brightness
OBJECT_THRESHOLD = 0.13  # a pixel further than this from the background's colours belongs to an object
SHARE_THRESHOLD = 0.35  # of the pixels, that must be near a background's colours
AREA_THRESHOLD = 0.006  # of the frame, that a second object covers at least


def find_background(video: Tensor) -> tuple[str | None, Tensor]:
    """The background whose colours most pixels are near, and each pixel's distance (f, h, w) to them.

    `video` is (3, f, h, w) in [0, 1]. The name is `None` if no background is near enough.
    """
    few = video[:, ::2, ::2, ::2]
    bright = few.mean(0).median().item()
    best, best_share, name = -1.0, 0.0, "black"
    for candidate, colour in BACKGROUNDS.items():
        share = (distance_to_background(few, candidate) < 0.5 * OBJECT_THRESHOLD).float().mean().item()
        fit = share - 0.5 * abs(bright - sum(colour) / 3)  # black, gray and white differ in brightness alone
        if fit > best:
            best, best_share, name = fit, share, candidate
    return (name if best_share > SHARE_THRESHOLD else None), distance_to_background(video, name)


def distance_to_background(video: Tensor, background: str) -> Tensor:
    """Distance (f, h, w) of the pixels (3, f, h, w) to the nearest colour of a background."""
    colour = torch.tensor(BACKGROUNDS[background], device=video.device)
    lighter = torch.tensor(LIGHTER[background], device=video.device)
    offset = video - colour[:, None, None, None]
    lines = ((DARKER - 1) * colour, 0.0, 1.0), (lighter - colour, 0.0, 1.0)
    lines += ((torch.ones_like(colour), -LIGHT_THRESHOLD, LIGHT_THRESHOLD),)
    return torch.stack([_distance_to_line(offset, *line)[0] for line in lines]).amin(0)


def texture_value(video: Tensor, background: str) -> Tensor:
    """The living texture's value (f, h, w) in [-1, 1] that would make the pixels (3, f, h, w) over a background."""
    colour = torch.tensor(BACKGROUNDS[background], device=video.device)
    offset = video - colour[:, None, None, None]
    above = _distance_to_line(offset, torch.tensor(LIGHTER[background], device=video.device) - colour, 0.0, 1.0)[1]
    below = _distance_to_line(offset, (DARKER - 1) * colour, 0.0, 1.0)[1]
    return (below - above) if background == "white" else (above - below)


def _distance_to_line(offset: Tensor, direction: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """Distance of points (3, ...) to low..high times a direction (3,), and the nearest multiple."""
    x, y, z = offset
    a, b, c = direction.tolist()
    nearest = ((a * x + b * y + c * z) / (a * a + b * b + c * c)).clamp(low, high)
    return ((x - a * nearest).square() + (y - b * nearest).square() + (z - c * nearest).square()).sqrt(), nearest


def clean(mask: Tensor) -> Tensor:
    """The mask (f, h, w) without specks: a majority vote of each 3x3 neighbourhood."""
    return F.avg_pool2d(mask.float()[:, None], 3, 1, 1)[:, 0] > 0.5


def grow(mask: Tensor, width: int = 5) -> Tensor:
    """The mask (f, h, w) as numbers 0 and 1, with a margin around it of half the width."""
    rows = F.max_pool2d(mask.float()[:, None], (width, 1), 1, (width // 2, 0))  # twice as fast in two parts
    return F.max_pool2d(rows, (1, width), 1, (0, width // 2))[:, 0]


def split_objects(mask: Tensor) -> list[Tensor]:
    """The masks (f, h, w) of two objects if there are two, else the mask as it is.

    An object is a region that hangs together over space and time, and is there in most frames.
    """
    regions = label(mask.numpy(), connectivity=3)
    counts = np.stack([np.bincount(frame.ravel(), minlength=regions.max() + 1) for frame in regions])[:, 1:]
    lasting = [i for i, n in enumerate(counts.T) if (n > AREA_THRESHOLD * regions[0].size).mean() > 0.7]
    if len(lasting) != 2:
        return [mask]
    other = torch.as_tensor(regions == lasting[1] + 1)
    return [mask & ~other, other]  # what is too small or too short for an object stays with the first


def zoom(image: Tensor, mask: Tensor) -> Tensor:
    """The half of images (f, h, w) around a mask that hardly moves, at double size."""
    width = image.shape[-1] // 2
    rows, columns = mask.any(0).any(1).nonzero(), mask.any(0).any(0).nonzero()
    top, left = (int((i.min() + i.max() + 1 - width) / 2) for i in (rows, columns))
    top, left = (min(max(0, i), width) for i in (top, left))
    part = image[:, None, top : top + width, left : left + width].float()
    return F.interpolate(part, scale_factor=2, mode="bilinear")[:, 0]
