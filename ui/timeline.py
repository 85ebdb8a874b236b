"""The timeline: what each step computed, reused or rebuilt, per branch and layer, as one SVG."""

from __future__ import annotations

from typing import NamedTuple

from markupsafe import Markup

from accel.core.trace import DENOISER
from ui.templating import render


class ActionStyle(NamedTuple):
    """How an action is drawn and what it is called."""

    colour: str
    label: str


ACTION_STYLE = {
    "compute": ActionStyle("#3b82f6", "computed"),
    "reuse": ActionStyle("#f59e0b", "attention reused"),
    "rebuild": ActionStyle("#a3a3a3", "branch rebuilt"),
    "reduce": ActionStyle("#10b981", "tokens reduced"),
    "predict": ActionStyle("#a855f7", "predicted"),
    "skip": ActionStyle("#e5e5e5", "skipped"),
}
CELL, GAP = 12, 2  # pixels from one cell to the next, and between them
LEFT, TOP = 78, 16  # pixels for the names of rows and the numbers of steps
BAR_HEIGHT = 28  # pixels of the slowest step


class Cell(NamedTuple):
    """One square: what one layer did in one step and branch."""

    x: int
    y: int
    action: str
    hint: str


class Bar(NamedTuple):
    """Duration of one step."""

    x: int
    height: float
    hint: str


def timeline(trace: dict) -> Markup:
    """SVG of a trace (`Trace.to_json()`): a column per step, a row per branch and layer; empty if there is no step."""
    steps, layers = trace.get("steps", []), trace.get("layers", [])
    if not steps:
        return Markup()
    labels = [(LEFT + (i - 1) * CELL, 9, i) for i in range(1, len(steps) + 1, 5)]
    cells, top = [], TOP
    for branch in _branches(trace):
        labels.append((0, top + 9, branch))
        cells += _cells(trace, branch, top)
        top += len(layers) * CELL + 8
    labels.append((0, top + 20, "ms/step"))
    used = {cell.action for cell in cells}
    return render(
        "timeline", cells=cells, labels=labels, bars=_bars(steps), bottom=top + BAR_HEIGHT, size=CELL - GAP,
        width=LEFT + len(steps) * CELL, height=top + BAR_HEIGHT + 6, styles=ACTION_STYLE,
        legend=[style for action, style in ACTION_STYLE.items() if action in used],
    )  # fmt: skip


def _branches(trace: dict) -> list[str]:
    recorded = {branch for _, branch, *_ in trace["events"]}
    return [branch for branch in ("cond", "uncond") if branch in recorded]


def _cells(trace: dict, branch: str, top: int) -> list[Cell]:
    """The cells of one branch. An action on the whole denoiser covers all its layers."""
    actions = {(step, layer): action for step, b, layer, action, _ in trace["events"] if b == branch}
    cells = []
    for row, layer in enumerate(trace["layers"]):
        for column, step in enumerate(trace["steps"]):
            denoiser = actions.get((step["index"], DENOISER), "compute")
            action = denoiser if denoiser != "compute" else actions.get((step["index"], layer), "compute")
            label = ACTION_STYLE[action].label
            hint = f"step {step['index'] + 1}, σ {step['sigma']:.3f}, {branch}, {layer}: {label}"
            cells.append(Cell(LEFT + column * CELL, top + row * CELL, action, hint))
    return cells


def _bars(steps: list[dict]) -> list[Bar]:
    slowest = max(step["ms"] for step in steps) or 1
    return [
        Bar(LEFT + i * CELL, BAR_HEIGHT * step["ms"] / slowest, f"step {step['index'] + 1}: {step['ms']:.0f} ms")
        for i, step in enumerate(steps)
    ]
