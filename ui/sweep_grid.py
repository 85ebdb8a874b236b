"""The results of a sweep as a grid of small looping clips, with the axes' values as headings."""

from __future__ import annotations

from dataclasses import dataclass

from markupsafe import Markup

from accel.evaluation.metrics import METRICS
from accel.evaluation.sweep import value_label
from ui.sweep_job import Result, SweepState
from ui.templating import render

MAX_PLAYING = 12  # with more clips, only the one under the pointer or with the focus plays


@dataclass(frozen=True)
class GridCell:
    """One place of the grid: a clip with its figures, a reason, or what it waits for."""

    label: str
    result: Result | None
    status: str

    @property
    def speed(self) -> str:
        """Its speed-up."""
        return f"{self.result.row['speedup']:.2f}×"

    @property
    def work(self) -> str:
        """The share of the work that was computed, which other load on the machine does not change."""
        return f"work {self.result.row['work']:.0%}"

    @property
    def quality(self) -> str:
        """Its SSIM in a few characters."""
        row = self.result.row
        return "bit-equal" if row["bit_equal"] else f"SSIM {METRICS['ssim'].format(row['ssim'])}"

    @property
    def words(self) -> str:
        """The same for a screen reader."""
        return f"Open {self.label}: {self.result.row['speedup']:.2f} times as fast, {self.work}, {self.quality}"


def sweep_grid(state: SweepState, running: int | None = None) -> Markup:
    """The grid as HTML, with a button for each result that has the id of its stored pair.

    `running`: the cell that runs now; None: the sweep has ended.
    """
    idle = "not measured" if running is None else "waiting"
    cells = [
        GridCell(cell.label, result, "running" if i == running else idle)
        for i, (cell, result) in enumerate(zip(state.plan.cells, state.results))
    ]
    settings = [cell for cell, planned in zip(cells, state.plan.cells) if not planned.plain]
    plain = [cell for cell, planned in zip(cells, state.plan.cells) if planned.plain]
    axes = state.plan.axes
    width = len(axes[-1].values)
    table = None
    if len(axes) == 2:
        heads = [value_label(axes[0].name, value) for value in axes[0].values]
        table = [(head, settings[i * width : (i + 1) * width]) for i, head in enumerate(heads)]
    return render(
        "sweep_grid", table=table, heads=[value_label(axes[-1].name, value) for value in axes[-1].values],
        name=" and ".join(axis.name.replace("_", " ") for axis in axes),
        settings=settings, plain=plain, plays=len(cells) <= MAX_PLAYING,
    )  # fmt: skip
