"""Fills that are told apart without seeing colours: each has a colour and a mark of lines."""

from __future__ import annotations

from typing import NamedTuple

Line = tuple[tuple[float, float], ...]  # points in a square of side 1

RISING, FALLING = ((0.1, 0.9), (0.9, 0.1)), ((0.1, 0.1), (0.9, 0.9))
LEVEL, UPRIGHT = ((0.1, 0.5), (0.9, 0.5)), ((0.5, 0.1), (0.5, 0.9))
BLUE, ORANGE, GREY, GREEN, PINK = "#0072b2", "#e69f00", "#b5b5b5", "#21b88a", "#d98bb5"


class Pattern(NamedTuple):
    """A colour, what it stands for, and the lines of its mark."""

    colour: str
    label: str
    mark: tuple[Line, ...] = ()

    def path(self, x: float, y: float, width: float, height: float) -> str:
        """The mark as SVG path data in a rectangle; empty without a mark."""
        at = lambda point: f"{x + point[0] * width:.5g} {y + point[1] * height:.5g}"
        return "".join("M" + "L".join(map(at, line)) for line in self.mark)
