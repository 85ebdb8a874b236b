"""Scenes to pixels: anti-aliased signed distances, shaded things, finely patterned backgrounds; any device."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .scene import Scene, Thing

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
RADIUS = {"small": 0.17, "large": 0.24}  # mean over the clip, in widths of the frame
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


def trajectory(thing: Thing, time: Tensor) -> Tensor:
    """(f, 4) of centre x, centre y, radius and angle at the times (f,) in [0, 1]; lengths in widths."""
    mix = lambda table: table[thing.speed][0] + thing.amount * (table[thing.speed][1] - table[thing.speed][0])
    zero = torch.zeros_like(time)
    radius = RADIUS[thing.size] * (0.95 + 0.1 * thing.phase) + zero
    reach = 0.05 + 1.05 * RADIUS[thing.size]  # keeps the thing inside the frame
    x, y = reach + thing.x * (1 - 2 * reach) + zero, reach + thing.y * (1 - 2 * reach) + zero
    angle = 0.5 * (thing.phase - 0.5) + zero
    if thing.motion in ("left", "right", "up", "down"):
        along = (time - 0.5) * mix(TRAVEL) * (1 if thing.motion in ("right", "down") else -1)
        drift = 0.5 + 0.06 * (thing.phase - 0.5) + along
        x, y = (drift, y) if thing.motion in ("left", "right") else (x, drift)
    elif thing.motion == "orbits":
        turn = 2 * math.pi * (thing.phase + thing.turn * mix(TURNS) * time)
        x, y = 0.5 + 0.21 * turn.cos(), 0.5 + 0.21 * turn.sin()
    elif thing.motion == "bounces":
        y = 0.70 - 0.38 * (math.pi * mix(HOPS) * time).sin().abs()
    elif thing.motion == "spins":
        angle = angle + 2 * math.pi * thing.turn * mix(SPIN) * time  # from where all things stand
    else:
        ratio = mix(RATIO)
        x, y = 0.5 + 0.16 * (thing.x - 0.5) + zero, 0.5 + 0.16 * (thing.y - 0.5) + zero
        grown = time if thing.motion == "grows" else 1 - time
        radius = radius * 2 * (1 + (ratio - 1) * grown) / (1 + ratio)
    return torch.stack([x, y, radius, angle], dim=-1)


def distance(shape: str, x: Tensor, y: Tensor) -> Tensor:
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


def _background(scene: Scene, size: int, device: torch.device | str) -> Tensor:
    """(h, w, 3) in [0, 1]: the colour, a soft vertical gradient and the pattern."""
    ramp = (torch.arange(size, device=device) + 0.5) / size
    y, x = ramp[:, None], ramp[None, :]
    wave = lambda u, i: (2 * math.pi * (CYCLES[scene.pattern] * u + scene.shift[i])).sin()
    value = torch.zeros(size, size, device=device)
    if scene.pattern == "striped":
        value = wave(y, 1).expand(size, size)
    elif scene.pattern == "checked":
        value = (2.5 * wave(x, 0) * wave(y, 1)).clamp(-1, 1)
    elif scene.pattern == "dotted":
        value = 2 * torch.sigmoid(4 * (wave(x, 0) + wave(y, 1) - 0.8)) - 0.5
    light = CONTRAST * value + 0.06 * (0.5 - y)
    return torch.tensor(BACKGROUNDS[scene.background], device=device) + light[..., None]


def render(scene: Scene, frames: int, size: int, device: torch.device | str = "cpu") -> Tensor:
    """Frames of a scene: uint8 (f, h, w, 3), square, `size` wide."""
    ramp = (torch.arange(size, device=device) + 0.5) / size
    image = _background(scene, size, device).expand(frames, size, size, 3)
    for thing in scene.things:
        cx, cy, radius, angle = trajectory(thing, torch.linspace(0, 1, frames)).to(device).unbind(-1)
        dx = (ramp[None, :] - cx[:, None]) / radius[:, None]
        dy = (ramp[None, :] - cy[:, None]) / radius[:, None]
        cos, sin = angle.cos()[:, None, None], angle.sin()[:, None, None]
        u = cos * dx[:, None, :] + sin * dy[:, :, None]  # the thing's own axes, (f, h, w)
        v = cos * dy[:, :, None] - sin * dx[:, None, :]
        pixels = distance(thing.shape, u, v) * (radius * size)[:, None, None]
        cover = (0.5 - pixels).clamp(0, 1)[..., None]
        # the bright side turns with the thing, so that a spin can be seen on every shape
        paint = torch.tensor(COLOURS[thing.colour], device=device) * (0.79 + 0.21 * (3 * u).tanh())[..., None]
        image = torch.lerp(image, paint, cover)
    return (image * 255).round().clamp(0, 255).to(torch.uint8)
