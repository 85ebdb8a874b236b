"""The timeline: the map of steps and layers, with a line that reads out the cell under the pointer, and as a table."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

from markupsafe import Markup

from accel.evaluation.step_map import ACTIONS, actions_by_layer, branches, step_map
from ui.templating import render

# For a `gr.HTML`: shows the hint of the cell under the pointer, or touched, in the line below the map.
READ_OUT = (
    "element.addEventListener('pointerover', e => { "
    "const t = e.target.tagName === 'rect' && e.target.firstElementChild; "
    "if (t) t.closest('.timeline, .token-maps').querySelector('.read-out').textContent = t.textContent; })"
)


class Row(NamedTuple):
    """A step of the table: its number, noise level, duration, and what each branch did in words."""

    step: int
    sigma: float
    ms: float
    branches: list[str]


def timeline(trace: dict) -> Markup:
    """HTML of a trace (`Trace.to_json()`); empty if there is no step.

    A `gr.HTML` that shows it needs `js_on_load=READ_OUT` for the line under the map.
    """
    picture = step_map(trace)
    if not picture:
        return Markup()
    return render("timeline", picture=picture, rows=_rows(trace), branches=branches(trace))


def _rows(trace: dict) -> list[Row]:
    actions = [list(zip(*actions_by_layer(trace, branch))) for branch in branches(trace)]
    return [
        Row(
            step["index"] + 1,
            step["sigma"],
            step["ms"],
            [_words(of_branch[i]) if of_branch else "" for of_branch in actions],
        )
        for i, step in enumerate(trace["steps"])
    ]


def _words(actions: tuple[str, ...]) -> str:
    """What the layers of one step did: "computed", or "4 computed, 4 attention reused"."""
    counts = Counter(ACTIONS[action].label for action in actions)
    return next(iter(counts)) if len(counts) == 1 else ", ".join(f"{n} {label}" for label, n in counts.items())
