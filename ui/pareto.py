"""Speed against quality as one SVG: a mark for each setting, the front, and lines through some series."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from markupsafe import Markup

from accel.evaluation.pareto_front import pareto_front
from ui.templating import render

WIDTH, HEIGHT = 560, 340
LEFT, RIGHT, TOP, BOTTOM = 66, 14, 12, 48  # pixels between the edges and the axes
COLOURS = ("b", "a", "c", "d")  # of series, as --side-b in page.css
SHAPES = {  # paths around (0, 0); with the colours they tell as many series apart
    "circle": "M-5 0a5 5 0 1 0 10 0a5 5 0 1 0 -10 0Z",
    "triangle": "M0 -6L6 5L-6 5Z",
    "diamond": "M0 -6.5L6 0L0 6.5L-6 0Z",
    "wedge": "M0 6L6 -5L-6 -5Z",
    "cross": "M-2 -6h4v4h4v4h-4v4h-4v-4h-4v-4h4Z",
    "bar": "M-6 -2.5h12v5h-12Z",
    "post": "M-2.5 -6h5v12h-5Z",
    "drop": "M-5 -5h10v5a5 5 0 0 1 -10 0Z",
}
LINE_SHAPE = "M-4.5 -4.5h9v9h-9Z"
LOG_TICKS = [m * 10**e for e in range(-2, 4) for m in (1, 1.5, 2, 3, 4, 5, 7)]


class Point(NamedTuple):
    """A measured setting: more is better in x and y. `y` None: its video equals the reference in every pixel."""

    x: float
    y: float | None
    series: str
    label: str  # shown next to the pointer
    id: str = ""  # of the stored pair that a click opens


class Mark(NamedTuple):
    """A point on the drawing, in pixels; `left` and `top` in percent, for the button over it."""

    x: float
    y: float
    point: Point
    style: SeriesStyle

    @property
    def left(self) -> float:
        """Percent from the left edge."""
        return 100 * self.x / WIDTH

    @property
    def top(self) -> float:
        """Percent from the upper edge."""
        return 100 * self.y / HEIGHT


class SeriesStyle(NamedTuple):
    """How a series is drawn."""

    name: str
    shape: str
    colour: str  # a CSS colour
    connected: bool


@dataclass(frozen=True)
class Scale:
    """Maps values from `low` to `high` to pixels from `start` to `end`."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """The pixel of a value; values outside the scale are drawn at its end."""
        f = math.log if self.log else float
        share = (f(value) - f(self.low)) / (f(self.high) - f(self.low))
        return self.start + min(max(share, 0.0), 1.0) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Round values on the scale, about five."""
        if self.log and self.high / self.low > 2.5:
            inside = [tick for tick in LOG_TICKS if self.low <= tick <= self.high]
            return inside[:: -(-len(inside) // 8)]
        step = 10 ** math.floor(math.log10((self.high - self.low) / 4))
        step *= next(m for m in (1, 2, 2.5, 5, 10) if (self.high - self.low) / (m * step) <= 6)
        first = math.ceil(self.low / step - 1e-9)
        return [round(i * step, 10) for i in range(first, int(self.high / step + 1e-9) + 1)]


def pareto_plot(
    points: Sequence[Point], x_title: str, y_title: str, connected: frozenset[str] = frozenset(), empty: str = ""
) -> Markup:
    """The plot as HTML, with a button over each point that has an id; `empty` is shown where there are no points.

    The points of the series in `connected` are joined by a line, in their order. The front is drawn over all points.
    """
    points = [point for point in points if point.x > 0]
    if not points:
        return render("note", text=empty, bad=False) if empty else Markup()
    xs = [point.x for point in points]
    ys = [point.y for point in points if point.y is not None] or [1.0]
    x = Scale(min(xs) / 1.08, max(xs) * 1.08, LEFT, WIDTH - RIGHT, log=True)
    room = (max(ys) - min(ys)) * 0.08 or abs(max(ys)) * 0.02 or 0.1
    y = Scale(min(ys) - room, max(ys) + room, HEIGHT - BOTTOM, TOP)
    styles = _styles(points, connected)
    marks = [
        Mark(x(point.x), y(math.inf if point.y is None else point.y), point, styles[point.series]) for point in points
    ]
    drawn = [(mark.point.x, math.inf if mark.point.y is None else mark.point.y) for mark in marks]
    lines = [(style, [m for m in marks if m.style == style]) for style in styles.values() if style.connected]
    return render(
        "pareto", marks=marks, styles=list(styles.values()),
        lines=lines, front=[marks[i] for i in pareto_front(drawn)], x=x, y=y, x_title=x_title,
        y_title=y_title, width=WIDTH, height=HEIGHT, left=LEFT, right=WIDTH - RIGHT, top=TOP, bottom=HEIGHT - BOTTOM,
    )  # fmt: skip


def _styles(points: Sequence[Point], connected: frozenset[str]) -> dict[str, SeriesStyle]:
    """The style of each series; those that are connected are grey squares."""
    styles, shapes = {}, list(SHAPES.values())
    for name in dict.fromkeys(point.series for point in points):
        if name in connected:
            styles[name] = SeriesStyle(name, LINE_SHAPE, "var(--body-text-color-subdued)", True)
        else:
            i = sum(not style.connected for style in styles.values())
            styles[name] = SeriesStyle(name, shapes[i % len(shapes)], f"var(--side-{COLOURS[i % len(COLOURS)]})", False)
    return styles
