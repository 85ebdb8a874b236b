"""What a running sweep says about itself."""

from __future__ import annotations

import time

from markupsafe import escape

from ui.panels import note
from ui.sweep_job import SweepState
from ui.sweep_plan import duration


class Progress:
    """What a running sweep says about itself."""

    def __init__(self, state: SweepState):
        self.state, self.left, self.first = state, "", 0.0

    def result(self) -> str:
        """After a result, or before the first one, whose time also has the reference and the model's loading in it."""
        count, ended, now = len(self.state.results), self.state.ended, time.monotonic()
        if ended == 1:
            self.first = now
        elif ended:
            self.left = f", about {duration((now - self.first) / (ended - 1) * (count - ended))} left"
        return f"{ended} of {count} results{self.left}."

    def step(self, index: int, pane: str, done: int, steps: int) -> str:
        """During a run."""
        what = "the reference" if pane == "a" else self.state.plan.cells[index].label
        return str(escape(f"Now {what}: step {done} of {steps}."))

    def waiting(self, index: int, ahead: int, loading: bool, seconds: float | None = None) -> str:
        """While other runs come first."""
        return "Loading the model…" if loading else f"Waiting: {ahead} run{'s' * (ahead != 1)} ahead of you."

    def ended(self, reason: str, stopped: bool):
        """At the end."""
        measured = f"{len(self.state.done)} of {len(self.state.results)} settings are measured"
        if reason:
            return note(f"{reason}. {measured}.", bad=True)
        return note(f"Stopped: {measured}. They are in your history." if stopped else f"Finished: {measured}.")
