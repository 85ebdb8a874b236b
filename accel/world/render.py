"""Scenes to pixels: anti-aliased signed distances, shaded objects, patterned or living backgrounds; any device."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .scene import LIVING, Object, Scene
from .textures import render_texture

COLOURS = {
    "red": (0.88, 0.13, 0.13),
    "orange": (0.98, 0.52, 0.06),
    "yellow": (0.96, 0.90, 0.15),
    "green": (0.15, 0.80, 0.20),
    "cyan": (0.15, 0.84, 0.90),
    "blue": (0.15, 0.32, 0.98),
    "purple": (0.58, 0.18, 0.88),
    "pink": (0.99, 0.52, 0.78),
}
BACKGROUNDS = {
    "black": (0.10, 0.10, 0.10),
    "gray": (0.48, 0.48, 0.48),
    "white": (0.90, 0.90, 0.90),
    "navy": (0.10, 0.14, 0.36),
    "brown": (0.36, 0.24, 0.14),
    "forest": (0.12, 0.30, 0.18),
}
LIGHTER = {  # the lighter end of a background's tones in a living texture; the darker end is DARKER times the colour
    "black": (0.74, 0.76, 0.80),
    "gray": (0.84, 0.85, 0.87),
    "white": (1.00, 1.00, 1.00),
    "navy": (0.55, 0.68, 0.95),
    "brown": (0.84, 0.70, 0.52),
    "forest": (0.60, 0.82, 0.54),
}
DARKER = 0.45
RADIUS = {"small": 0.17, "large": 0.24}  # mean over the clip, in widths of the frame
SECOND_RADIUS = {"small": 0.095, "large": 0.135}  # of an object that floats: always smaller than a first one
SHADOW = 0.38  # share of the light that the middle of a shadow takes away
CONTRAST = 0.07  # of the pattern, added to every channel
CYCLES = {"striped": 8, "checked": 4, "dotted": 6}  # periods of the pattern across the frame
# in each speed's range [low, high]: distance in widths, turns of an orbit and of a spin, hops, ratio of last to first
# radius. A fast spin of 17 frames turns a star by less than a quarter of its symmetry a frame, less than half of it a
# latent frame: beyond that it would be seen to turn the other way.
TRAVEL = {"slowly": (0.16, 0.21), "quickly": (0.44, 0.52)}
TURNS = {"slowly": (0.40, 0.55), "quickly": (1.20, 1.45)}
SPIN = {"slowly": (0.27, 0.36), "quickly": (0.64, 0.75)}
HOPS = {"slowly": (1.0, 1.2), "quickly": (2.8, 3.2)}
RATIO = {"slowly": (1.45, 1.60), "quickly": (2.4, 2.8)}


def trajectory(item: Object, time: Tensor) -> Tensor:
    """(f, 4) of centre x, centre y, radius and angle at the times (f,) in [0, 1]; lengths in frame widths."""
    if item.motion == "floats":
        return _floating(item, time)
    within = lambda table: table[item.speed][0] + item.speed_fraction * (table[item.speed][1] - table[item.speed][0])
    zero = torch.zeros_like(time)
    radius = RADIUS[item.size] * (0.95 + 0.1 * item.phase) + zero
    margin = 0.05 + 1.05 * RADIUS[item.size]  # keeps the object inside the frame
    x, y = margin + item.x * (1 - 2 * margin) + zero, margin + item.y * (1 - 2 * margin) + zero
    angle = 0.5 * (item.phase - 0.5) + zero
    if item.motion in ("left", "right", "up", "down"):
        along = (time - 0.5) * within(TRAVEL) * (1 if item.motion in ("right", "down") else -1)
        drift = 0.5 + 0.06 * (item.phase - 0.5) + along
        x, y = (drift, y) if item.motion in ("left", "right") else (x, drift)
    elif item.motion == "orbits":
        turn = 2 * math.pi * (item.phase + item.direction * within(TURNS) * time)
        x, y = 0.5 + 0.21 * turn.cos(), 0.5 + 0.21 * turn.sin()
    elif item.motion == "bounces":
        y = 0.70 - 0.38 * (math.pi * within(HOPS) * time).sin().abs()
    elif item.motion == "spins":
        angle = angle + 2 * math.pi * item.direction * within(SPIN) * time  # from where all objects stand
    else:
        ratio = within(RATIO)
        x, y = 0.5 + 0.16 * (item.x - 0.5) + zero, 0.5 + 0.16 * (item.y - 0.5) + zero
        grown = time if item.motion == "grows" else 1 - time
        radius = radius * 2 * (1 + (ratio - 1) * grown) / (1 + ratio)
    return torch.stack([x, y, radius, angle], dim=-1)


def _floating(item: Object, time: Tensor) -> Tensor:
    """As `trajectory`, of a second object: it bobs and rocks a little around its place."""
    swing = 2 * math.pi * (item.phase + (0.6 + 0.5 * item.speed_fraction) * time)
    x, y = item.x + 0.012 * (0.7 * swing).cos(), item.y + 0.022 * swing.sin()
    radius = torch.full_like(time, SECOND_RADIUS[item.size] * (0.97 + 0.06 * item.phase))
    return torch.stack([x, y, radius, 0.2 * item.direction * swing.cos()], dim=-1)


def signed_distance(shape: str, x: Tensor, y: Tensor) -> Tensor:
    """Signed distance to the outline of a shape of unit radius, negative inside; any shape of x and y."""
    if shape == "circle":
        return x.hypot(y) - 1
    if shape == "ring":
        return (x.hypot(y) - 0.75).abs() - 0.27
    if shape == "square":
        return torch.maximum(x.abs(), y.abs()) - 0.84
    if shape == "triangle":
        sides = [math.cos(a) * x + math.sin(a) * y for a in (math.pi / 3, math.pi, 5 * math.pi / 3)]
        return torch.maximum(torch.maximum(sides[0], sides[1]), sides[2]) - 0.64
    if shape == "cross":
        x, y = x.abs(), y.abs()
        return torch.minimum(torch.maximum(x - 1, y - 0.33), torch.maximum(x - 0.33, y - 1))
    fold = 2 * math.pi / 5  # star: five tips at 1.2, five notches at 0.5
    angle, length = torch.atan2(y, x), x.hypot(y)
    angle = angle - fold * (angle / fold).round()
    px, py = length * angle.cos() - 1.2, length * angle.sin().abs()
    ex, ey = 0.5 * math.cos(fold / 2) - 1.2, 0.5 * math.sin(fold / 2)
    return (px * ey - py * ex) / math.hypot(ex, ey)


def render(scene: Scene, frames: int, size: int, device: torch.device | str = "cpu") -> Tensor:
    """Frames of a scene: uint8 (f, h, w, 3), square, `size` wide."""
    time = torch.linspace(0, 1, frames)
    image = _background(scene, time, size, device)
    paths = [trajectory(item, time) for item in scene.objects]
    for path in paths:
        image *= 1 - SHADOW * _shadow(path.to(device), size)
    for item, path in zip(scene.objects, paths):
        _paint(image, item, path)
    return image.mul_(255).round_().clamp_(0, 255).to(torch.uint8).permute(1, 2, 3, 0).contiguous()


def _background(scene: Scene, time: Tensor, size: int, device: torch.device | str) -> Tensor:
    """(3, f, h, w) in [0, 1]: the colour with its living texture, or with a soft gradient and a regular pattern."""
    colour = torch.tensor(BACKGROUNDS[scene.background], device=device)
    if scene.pattern in LIVING:
        return tone(scene.background, render_texture(scene.pattern, scene.texture_seed, time, size, device))
    return (colour[:, None, None, None] + _regular(scene, size, device)).repeat(1, len(time), 1, 1)


def tone(background: str, value: Tensor) -> Tensor:
    """(3, ...): the colours of a living texture's values (...) in [-1, 1] over a background."""
    value = -value if background == "white" else value  # there is no room above white
    above, below = value.clamp(min=0), value.clamp(max=0)
    channels = zip(BACKGROUNDS[background], LIGHTER[background])
    return torch.stack([(below * (c * (1 - DARKER)) + c).add_(above, alpha=lighter - c) for c, lighter in channels])


def _regular(scene: Scene, size: int, device: torch.device | str) -> Tensor:
    """(h, w) to be added to each channel: a soft vertical gradient and the pattern."""
    ramp = (torch.arange(size, device=device) + 0.5) / size
    y, x = ramp[:, None], ramp[None, :]
    wave = lambda u, i: (2 * math.pi * (CYCLES[scene.pattern] * u + scene.pattern_phase[i])).sin()
    value = torch.zeros(size, size, device=device)
    if scene.pattern == "striped":
        value = wave(y, 1).expand(size, size)
    elif scene.pattern == "checked":
        value = (2.5 * wave(x, 0) * wave(y, 1)).clamp(-1, 1)
    elif scene.pattern == "dotted":
        value = 2 * torch.sigmoid(4 * (wave(x, 0) + wave(y, 1) - 0.8)) - 0.5
    return CONTRAST * value + 0.06 * (0.5 - y)


def _shadow(path: Tensor, size: int) -> Tensor:
    """(f, h, w) in [0, 1]: a soft round shadow to the lower right of an object's path (f, 4)."""
    x, y, radius, _ = path.unbind(-1)
    ramp = (torch.arange(size, device=path.device) + 0.5) / size
    profile = lambda centre: (-(((ramp - centre[:, None]) / (0.95 * radius[:, None])) ** 2)).exp()
    return profile(y + 0.55 * radius)[:, :, None] * profile(x + 0.3 * radius)[:, None, :]


def _paint(image: Tensor, item: Object, path: Tensor) -> None:
    """Paint an object at its path (f, 4) over the image (3, f, h, w), in a window that follows it."""
    size, device = image.shape[-1], image.device
    cx, cy, radius, angle = path.unbind(-1)
    width = min(size, 2 * math.ceil(1.22 * radius.max().item() * size) + 3)
    left, top = ((c * size - width / 2).round().long().clamp(0, size - width) for c in (cx, cy))
    ramp = torch.arange(width) + 0.5
    dx = ((left[:, None] + ramp) / size - cx[:, None]) / radius[:, None]
    dy = ((top[:, None] + ramp) / size - cy[:, None]) / radius[:, None]
    cos, sin, dx, dy, scale = (t.to(device) for t in (angle.cos(), angle.sin(), dx, dy, radius * size))
    cos, sin = cos[:, None, None], sin[:, None, None]
    u = cos * dx[:, None, :] + sin * dy[:, :, None]  # the object's own axes, (f, width, width)
    v = cos * dy[:, :, None] - sin * dx[:, None, :]
    cover = (0.5 - signed_distance(item.shape, u, v) * scale[:, None, None]).clamp(0, 1)
    # the bright side turns with the object, so that a spin can be seen on every shape
    light = 0.79 + 0.21 * (3 * u).tanh()
    colour = torch.tensor(COLOURS[item.colour], device=device)[:, None, None]
    for frame, (x, y) in enumerate(zip(left.tolist(), top.tolist())):
        image[:, frame, y : y + width, x : x + width].lerp_(colour * light[frame], cover[frame].expand(3, -1, -1))
