"""The two large panes while a pair is generated: preview, step, speed, time left, and the speed-up as it emerges."""

from __future__ import annotations

from dataclasses import dataclass

from markupsafe import Markup

from ui.templating import render

MIN_STEPS_FOR_SPEED = 3  # of the candidate, before a speed-up is told


@dataclass
class Pane:
    """One side: its settings in words, and how far it is."""

    label: str
    steps: int
    done: int = 0
    seconds: float = 0.0  # of denoising so far
    work: float | None = None  # share of the work of these steps
    image: str | None = None  # data URI
    status: str = ""

    @property
    def seconds_left(self) -> float:
        """Expected from the steps so far."""
        return self.seconds / self.done * (self.steps - self.done) if self.done else 0.0

    @property
    def text(self) -> str:
        """Step, ms/step, time left and work; or why there is nothing to tell yet."""
        if not self.done:
            return self.status
        parts = [f"step {self.done} / {self.steps}", f"{1000 * self.seconds / self.done:.0f} ms/step"]
        parts += [f"{self.seconds_left:.1f} s left"] if self.done < self.steps else [f"done in {self.seconds:.1f} s"]
        return " · ".join(parts + ([f"{self.work:.0%} of these steps' work"] if self.work is not None else []))


class Live:
    """What the panes of one visitor's running pair show."""

    def __init__(self, label_a: str, steps_a: int, label_b: str, steps_b: int, cached_seconds: float | None):
        """`cached_seconds`: denoising time of a reference that was generated before, or None."""
        self.panes = {"a": Pane(label_a, steps_a), "b": Pane(label_b, steps_b)}
        if cached_seconds is None:
            self.panes["a"].status, self.panes["b"].status = "warming up", "after the reference"
        else:
            self.panes["a"].done, self.panes["a"].seconds = steps_a, cached_seconds
            self.panes["b"].status = "warming up; the reference was generated before"

    def step(self, which: str, done: int, seconds: float, work: float, image: str | None) -> Markup:
        """The panes after a step of one side."""
        pane = self.panes[which]
        pane.done, pane.seconds, pane.work, pane.image = done, seconds, work, image or pane.image
        return self.html()

    def html(self) -> Markup:
        """Both panes and the line between them."""
        return render("live", panes=self.panes, line=self.line())

    def line(self) -> str:
        """The speed-up so far, once enough steps of both sides are done; then what is still to do."""
        a, b = self.panes["a"], self.panes["b"]
        if b.done == b.steps:
            return "decoding and comparing…"
        if a.done < a.steps or b.done < MIN_STEPS_FOR_SPEED:
            return ""
        return f"{a.seconds / (b.seconds + b.seconds_left):.2f}× as fast so far"
