"""The results of a sweep, and earlier ones, as points of the plot of speed against quality."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from accel.evaluation.metrics import METRICS
from accel.evaluation.sweep import value_label
from accel.evaluation.sweep_rows import figures
from accel.runtime.repeat import reference_of
from ui.pareto import Point
from ui.run_words import run_of
from ui.side_settings import describe_side

if TYPE_CHECKING:
    from ui.store import Stored
    from ui.sweep_job import SweepState

PLAIN_SERIES, EARLIER_SERIES = "plain steps", "earlier results"
PLOTTED = {m.name: m for m in METRICS.values() if "page" in m.shown_in and m.higher_is_better}
MEASURED = "measured"
SPEEDS = {  # how speed is told -> title of the horizontal axis
    MEASURED: "measured speed-up of the denoising",
    "by work": "speed-up if all the work that is saved were time",
}
MAX_SERIES = 8  # values of the first axis that get a mark each


def sweep_points(state: SweepState, metric: str, speed: str) -> list[Point]:
    """The measured results as points; a series for each value of the first of two axes, if they are few."""
    axes, points = state.plan.axes, []
    grouped = len(axes) == 2 and len(axes[0].values) <= MAX_SERIES
    for cell, result in zip(state.plan.cells, state.results):
        if not result or not result.row:
            continue
        series = PLAIN_SERIES if cell.plain else "settings"
        if grouped and not cell.plain:
            series = value_label(axes[0].name, cell.values[axes[0].name])
        points += _points(result.row, result.run_id, series, cell.label, metric, speed)
    return points


def earlier_points(pairs: Sequence[Stored], metric: str, speed: str) -> list[Point]:
    """Stored pairs of other sweeps and runs as points of one series."""
    return [
        point
        for pair in pairs
        for point in _points(figures(pair.report), pair.id, EARLIER_SERIES, _earlier_label(pair.report), metric, speed)
    ]


def _points(row: dict, run_id: str, series: str, label: str, metric: str, speed: str) -> list[Point]:
    """A row as a point of the plot, with its figures in the label; none if the metric was not measured."""
    m = PLOTTED[metric]
    value = row.get(f"{m.name}_b" if m.of_one_video else m.name)
    if value is None and not row["bit_equal"]:
        return []
    text = f"{label}\n{row['speedup']:.2f}× as fast, {row['work']:.0%} of the work\n{m.title} {m.format(value)}"
    return [Point(speed_of(row, speed), value, series, text, run_id)]


def reference_settings(pair: Stored) -> dict[str, Any]:
    """The settings of a pair's reference, without its seed."""
    return {key: value for key, value in reference_of(pair.report).items() if key != "seed"}


def speed_of(row: dict, speed: str) -> float:
    """The speed-up of a row: measured, or what it would be if all the work that is saved were time."""
    return row["speedup"] if speed == MEASURED else 1 / row["work"]


def _earlier_label(report: dict) -> str:
    """A pair of another sweep or run in a few words."""
    return f"{describe_side(report)}, seed {report['seed']}, against {describe_side(run_of(report, 'a'))}"


def quality_title(metric: str) -> str:
    """A metric as the title of an axis, as "SSIM to the baseline" or "adherence"."""
    about = PLOTTED[metric].about.partition(",")[0]
    return about if about[0].isupper() else PLOTTED[metric].title
