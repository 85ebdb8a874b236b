"""What each step computed, reused or rebuilt, per branch and layer, as one SVG that needs no style sheet.

Every action has its own colour and its own mark, so the map can be read without seeing colours.
"""

from __future__ import annotations

from typing import NamedTuple

from markupsafe import Markup

from ..core.trace import DENOISER
from .markup import render
from .patterns import BLUE, FALLING, GREEN, GREY, LEVEL, ORANGE, PINK, RISING, UPRIGHT, Pattern

ACTIONS = {
    "compute": Pattern(BLUE, "computed"),
    "reuse": Pattern(ORANGE, "attention reused", (RISING,)),
    "rebuild": Pattern(GREY, "branch rebuilt", (RISING, FALLING)),
    "reduce": Pattern(GREEN, "tokens reduced", (LEVEL,)),
    "predict": Pattern(PINK, "predicted", (UPRIGHT,)),
}
LEFT, TOP = 76, 20  # pixels for the names of rows and the numbers of steps
WIDTH = 860  # pixels that the map takes at most, as long as a cell has its least width
CELL = (7, 14)  # least and greatest width of a cell with its gap
BAR_HEIGHT = 32  # pixels of the slowest step


class Cell(NamedTuple):
    """One square: what one layer did in one step and branch."""

    x: float
    y: float
    action: str
    hint: str


class Bar(NamedTuple):
    """Duration of one step."""

    x: float
    height: float
    hint: str


class Label(NamedTuple):
    """A text, anchored at its "start" or "end"."""

    x: float
    y: float
    text: str
    anchor: str = "start"


def step_map(trace: dict) -> Markup:
    """A trace (`Trace.to_json()`) as SVG: a column per step, a row per branch and layer; empty if there is no step."""
    steps, layers = trace.get("steps", []), trace.get("layers", [])
    if not steps:
        return Markup()
    column = min(max((WIDTH - LEFT - 2) / len(steps), CELL[0]), CELL[1])
    row = 12 if len(layers) <= 12 else 7
    labels = [Label(LEFT + i * column, 12, f"{i + 1}") for i in range(0, len(steps), 5)]
    cells, top = [], TOP
    for branch in branches(trace):
        bottom = top + max(len(layers) - 1, 0) * row
        labels += [Label(0, top + 10, branch), Label(LEFT - 6, top + 10, _short(layers, 0), "end")]
        labels += [Label(LEFT - 6, bottom + 10, _short(layers, -1), "end")] if bottom - top >= 14 else []
        cells += _cells(trace, branch, top, column, row)
        top += len(layers) * row + 10
    slowest = max(step["ms"] for step in steps)
    labels += [Label(0, top + 12, "ms/step"), Label(0, top + 28, f"up to {slowest:.0f}")]
    used = dict.fromkeys(cell.action for cell in cells)
    size = (round(column - 1, 2), row - 1)
    return render(
        "step_map", cells=cells, labels=labels, bars=_bars(steps, column), bottom=top + BAR_HEIGHT, size=size,
        width=round(LEFT + len(steps) * column + 2), height=top + BAR_HEIGHT + 4, patterns=ACTIONS,
        legend=[pattern for action, pattern in ACTIONS.items() if action in used],
        marks=[_marks(cells, action, size) for action in used],
    )  # fmt: skip


def branches(trace: dict) -> list[str]:
    """The guidance branches of a trace, the conditional one first."""
    recorded = {branch for _, branch, *_ in trace["events"]}
    return [branch for branch in ("cond", "uncond") if branch in recorded]


def actions_by_layer(trace: dict, branch: str) -> list[list[str]]:
    """For each layer the action of each step. An action on the whole denoiser covers all its layers."""
    actions = {(step, layer): action for step, b, layer, action, _ in trace["events"] if b == branch}
    rows = []
    for layer in trace["layers"]:
        denoiser = [actions.get((step["index"], DENOISER), "compute") for step in trace["steps"]]
        own = [actions.get((step["index"], layer), "compute") for step in trace["steps"]]
        rows.append([whole if whole != "compute" else mine for whole, mine in zip(denoiser, own)])
    return rows


def _short(layers: list[str], index: int) -> str:
    """The number of a block, from a name such as "blocks.0.attn1"; empty where the name has none."""
    numbers = [part for part in layers[index].split(".") if part.isdigit()] if layers else []
    return numbers[0] if numbers else ""


def _cells(trace: dict, branch: str, top: float, column: float, row: float) -> list[Cell]:
    cells = []
    for y, (layer, actions) in enumerate(zip(trace["layers"], actions_by_layer(trace, branch))):
        for x, (step, action) in enumerate(zip(trace["steps"], actions)):
            label = ACTIONS[action].label
            hint = f"step {step['index'] + 1}, σ {step['sigma']:.3f}, {branch}, {layer}: {label}"
            cells.append(Cell(round(LEFT + x * column, 2), top + y * row, action, hint))
    return cells


def _marks(cells: list[Cell], action: str, size: tuple[float, float]) -> str:
    """The marks of all cells of an action as one path: one element instead of hundreds."""
    return "".join(ACTIONS[action].path(cell.x, cell.y, *size) for cell in cells if cell.action == action)


def _bars(steps: list[dict], column: float) -> list[Bar]:
    slowest = max(step["ms"] for step in steps) or 1
    return [
        Bar(
            round(LEFT + i * column, 2),
            BAR_HEIGHT * step["ms"] / slowest,
            f"step {step['index'] + 1}: {step['ms']:.0f} ms",
        )
        for i, step in enumerate(steps)
    ]
