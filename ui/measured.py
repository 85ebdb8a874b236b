"""The committed benchmark results as HTML: tables that can be sorted, plots, and differences of pairs."""

from __future__ import annotations

import json
import math
import re
from typing import NamedTuple

from accel.evaluation.metrics import METRICS
from accel.evaluation.report import Column, columns, conditions, machine
from accel.evaluation.suites import FRONT, RESULTS, SUITES, baseline_at_matched_time, preset_rows
from ui.pareto import Point, pareto_plot
from ui.templating import render

ALL = "all presets"
NUMBER = re.compile(r"-?\d+(\.\d+)?")
TOY = "A toy model: this shows how the methods work and what they compare to, not what they give on a large model."
RANDOM = "Random weights in a real model's size: this shows time and memory, and says nothing about quality."


class Row(NamedTuple):
    """A setting of a table: its name and the text of each column."""

    name: str
    cells: list[str]


class Order(NamedTuple):
    """How a table is sorted: by which column (0 is the name), and whether downwards."""

    column: int = -1  # as measured
    down: bool = True


def suite_names() -> list[str]:
    """All presets together, then every suite that was measured; those that are no suite of `bench` at the end."""
    names = [file.parent.name for file in sorted(RESULTS.glob("*/results.json"))]
    known = [name for name in SUITES if name in names]
    presets = [ALL] if FRONT in names else []
    return [*presets, *known, *(name for name in names if name not in SUITES)]


def read(suite: str) -> dict:
    """The results of a suite, or those of all presets, whose rows have the "matched" baseline of their time.

    For a name that is not offered, those of the first one that is.
    """
    offered = suite_names()
    suite = suite if suite in offered else offered[0]
    found = json.loads((RESULTS / (FRONT if suite == ALL else suite) / "results.json").read_text())
    if suite != ALL:
        return found
    rows = {p: {**row, "matched": baseline_at_matched_time(found, row)} for p, row in preset_rows(found).items()}
    return {**found, "rows": rows, "pairs": []}


def about(suite: str, found: dict) -> list[str]:
    """Where and how often a suite was measured, and what that is worth."""
    if "layout" in found:
        size = "{width}×{height}, {frames} frames, {steps} steps, guidance {guidance:g}".format(**found)
        return [f"{machine(found)}, {found['layout']}, {size}; n = {found['n']}.", RANDOM]
    return [f"{conditions(found)}.", TOY]


def shown_columns(rows: dict[str, dict]) -> list[Column]:
    """The columns of a table: speed, the metrics that were measured, memory, and the matched baseline."""
    found = columns("report", rows)
    first = next(iter(rows.values()))
    if "peak_memory_bytes" in first:
        found.append(Column("peak memory GB", lambda row: f"{row['peak_memory_bytes'] / 1e9:.1f}"))
    if "matched" in first:
        found.append(Column("SSIM of the baseline in the same time", lambda row: row["matched"]))
    return found


def table(found: dict, order: Order) -> str:
    """The settings of a suite as a table whose headings are buttons."""
    shown = shown_columns(found["rows"])
    rows = [Row(name, [column.cell(row) for column in shown]) for name, row in found["rows"].items()]
    if order[0] >= 0:
        key = (lambda row: row.name) if order[0] == 0 else (lambda row: _number(row.cells[order[0] - 1]))
        rows.sort(key=key, reverse=order[1])
    return render("results_table", titles=["setting", *(column.title for column in shown)], rows=rows, order=order)


def _number(text: str) -> float:
    """The first number of a cell; what is bit-equal is better than any."""
    number = NUMBER.match(text)
    return float(number[0]) if number else math.inf if text == "bit-equal" else -math.inf


def has_metric(found: dict, metric: str) -> bool:
    """Whether a metric was measured."""
    return any(row.get(metric) is not None for row in found["rows"].values())


def plot(found: dict, metric: str) -> str:
    """Speed-up against a metric; settings of one kind are a series, and the baseline's step counts are a line."""
    if not has_metric(found, metric):
        return ""
    title = METRICS[metric].title
    points = [
        Point(row["speedup"], row[metric][0] if row.get(metric) else None, name.split(",")[0],
              f"{name}\n{row['speedup']:.2f}×, {title} " + _value(row, metric))
        for name, row in found["rows"].items()
    ]  # fmt: skip
    return pareto_plot(points, "speed-up of the denoising", title, connected=frozenset({"baseline"}))


def _value(row: dict, metric: str) -> str:
    digits = METRICS[metric].digits
    return "{:.{d}f} [{:.{d}f}, {:.{d}f}]".format(*row[metric], d=digits) if row.get(metric) else "bit-equal"


def differences(found: dict) -> str:
    """The pairs of a suite: how a setting differs from others, prompt by prompt."""
    pairs = found.get("pairs") or []
    if not pairs:
        return ""
    shown = [m for m in METRICS.values() if "pairs" in m.shown_in and any(pair.get(m.name) for pair in pairs)]
    rows = [
        [pair["a"], pair["b"], f"{pair['speed']:.2f}", *(_difference(pair.get(m.name), m.digits) for m in shown)]
        for pair in pairs
    ]
    return render(
        "results_pairs", titles=["A", "B", "speed of A / B", *(f"{m.title}, A − B" for m in shown)], rows=rows
    )


def _difference(value: list[float] | None, digits: int) -> str:
    return "{:+.{d}f} [{:+.{d}f}, {:+.{d}f}]".format(*value, d=digits) if value else "-"
