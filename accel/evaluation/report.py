"""Summaries of measured settings: means with intervals, differences of pairs, Markdown tables."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..errors import amount
from ..runtime.models import TINY
from .metrics import METRICS, Metric, mean_of
from .stats import format_interval, interval

Lines = dict[str, dict]  # setting -> its line


class Column(NamedTuple):
    """A column of a table: its title, and the cell of a summarized setting."""

    title: str
    cell: Callable[[dict], str]


SPEED = {
    "denoise s": lambda r: f"{r['seconds']:.2f}",
    "speed-up": lambda r: "{:.2f} [{:.2f}, {:.2f}]".format(r["speedup"], *r["speedup_range"]),
    "work": lambda r: f"{r['work']:.2f}",
    "efficiency": lambda r: f"{r['efficiency']:.2f}",
}
SPEED_OF = {"brief": ("denoise s", "speed-up", "efficiency"), "report": tuple(SPEED), "details": ()}


def summarize(cases: Sequence[dict], pairs: Sequence[tuple[str, str]] = ()) -> dict:
    """Summary of cases {"prompt", "rows": {setting: line}}, the first setting being the baseline.

    Per setting: medians of speed-up and work, the baseline's median time over the speed-up, means of the metrics with
    95 % bootstrap intervals. `pairs`: settings whose difference is computed prompt by prompt. Seeds of one prompt are
    averaged first, as they are not independent.
    """
    prompts, names = _by_prompt(cases), list(cases[0]["rows"])
    rows = {name: _setting(prompts, name, names[0]) for name in names}
    about = {"n": len(cases), "prompts": len(prompts), "noises": len({case.get("seed") for case in cases})}
    return {**about, "rows": rows, "pairs": paired_differences(cases, pairs)}


def paired_differences(cases: Sequence[dict], pairs: Sequence[tuple[str, str]]) -> list[dict]:
    """How settings (a, b) differ prompt by prompt, for the pairs of which both were measured."""
    prompts, known = _by_prompt(cases), cases[0]["rows"]
    return [_pair(prompts, a, b) for a, b in pairs if a in known and b in known]


def _by_prompt(cases: Sequence[dict]) -> list[list[Lines]]:
    found: dict[str, list[Lines]] = {}
    for case in cases:
        found.setdefault(case["prompt"], []).append(case["rows"])
    return list(found.values())


def _per_prompt(prompts: list[list[Lines]], value: Callable[[Lines], float | None]) -> list[float]:
    """A value of each prompt: the mean over its seeds, without those for which the value is not defined."""
    found = [[v for case in cases if (v := value(case)) is not None] for cases in prompts]
    return [float(np.mean(values)) for values in found if values]


def _interval(prompts: list[list[Lines]], value: Callable[[Lines], float | None]) -> tuple[float, float, float] | None:
    values = _per_prompt(prompts, value)
    return interval(values) if values else None


def _difference(prompts: list[list[Lines]], a: str, b: str, metric: Metric) -> tuple[float, float, float] | None:
    """A metric of setting a minus that of b, prompt by prompt."""

    def value(case: Lines) -> float | None:
        x, y = (mean_of(case[name][metric.name]) for name in (a, b))
        return None if x is None or y is None else x - y

    return _interval(prompts, value)


def _speedup(line: dict) -> float:
    """How many times faster a line's video was than the baseline of its turn."""
    return line["baseline_denoise"] / line["denoise"]


def _setting(prompts: list[list[Lines]], name: str, baseline: str) -> dict:
    lines, base = ([case[n] for cases in prompts for case in cases] for n in (name, baseline))
    speedups = [_speedup(line) for line in lines]
    work = float(np.median([r["flops"] / b["flops"] for r, b in zip(lines, base, strict=True)]))
    row = {
        "seconds": float(np.median([b["denoise"] for b in base]) / np.median(speedups)),  # at one pace over all days
        "decode": float(np.median([r["decode"] for r in lines])),
        "speedup": float(np.median(speedups)),
        "speedup_range": [float(q) for q in np.quantile(speedups, (0.05, 0.95))],
        "work": work,
        "efficiency": float(np.median(speedups)) * work,
    }
    for metric in METRICS.values():
        if all(metric.name in line for line in (*lines, *base)):
            row |= _metric(prompts, name, baseline, metric)
    return row


def _metric(prompts: list[list[Lines]], name: str, baseline: str, metric: Metric) -> dict:
    """The entries of a setting's summary that one metric gives."""
    if metric.worst_only:
        worst = max if metric.higher_is_better is False else min
        return {metric.name: worst(case[name][metric.name] for cases in prompts for case in cases)}
    found = {metric.name: _interval(prompts, lambda case: mean_of(case[name][metric.name]))}
    if metric.of_one_video:
        found[f"{metric.name}_delta"] = _difference(prompts, name, baseline, metric)
    if metric.parts:
        read = [case[name][metric.name] or {} for cases in prompts for case in cases]
        parts = dict.fromkeys(part for parts in read for part in parts if part != "mean")  # not every prompt has all
        value = lambda part: lambda case: (case[name][metric.name] or {}).get(part)
        found[metric.parts] = {part: _interval(prompts, value(part)) for part in parts}
    return found


def _pair(prompts: list[list[Lines]], a: str, b: str) -> dict:
    """The speed of setting a in parts of b's, the difference a - b of each metric for pairs, and how often a is closer.

    "closer": the prompts for which the SSIM of a is higher, and all of them. A few that become another scene decide a
    mean, but not this number.
    """
    is_measured = lambda metric: all(
        metric.name in case[name] for cases in prompts for case in cases for name in (a, b)
    )
    shown = [m for m in METRICS.values() if "pairs" in m.shown_in and is_measured(m)]
    speed = float(np.median([_speedup(case[a]) / _speedup(case[b]) for cases in prompts for case in cases]))
    differences = {m.name: _difference(prompts, a, b, m) for m in shown}
    if "ssim" in differences:
        ahead = [d > 0 for d in _per_prompt(prompts, lambda case: case[a]["ssim"] - case[b]["ssim"])]
        differences["closer"] = sum(ahead), len(ahead)
    return {"a": a, "b": b, "speed": speed, **differences}


def columns(kind: str, rows: dict[str, dict]) -> list[Column]:
    """The columns of a "brief", "report" or "details" table of summarized settings."""
    found = [Column(title, SPEED[title]) for title in SPEED_OF[kind]]
    for metric in METRICS.values():
        if kind not in metric.shown_in or not any(metric.name in row for row in rows.values()):
            continue
        if kind == "details" and metric.parts:
            parts = next((list(row[metric.parts]) for row in rows.values() if row.get(metric.parts)), [])
            found += [Column(part, partial(_part_cell, metric.parts, part)) for part in parts]
            continue
        found.append(Column(metric.title, lambda r, m=metric: cell(m, r.get(m.name))))
        if metric.of_one_video:
            found.append(Column(f"delta {metric.title}", lambda r, m=metric: cell(m, r.get(f"{m.name}_delta"))))
    return found


def _part_cell(parts: str, part: str, row: dict) -> str:
    return f"{row[parts][part][0]:.2f}" if part in row.get(parts, {}) else "-"


def cell(metric: Metric, value: Sequence[float] | float | None) -> str:
    """A summarized metric as text: mean [low, high], or one number."""
    if value is None:
        return metric.undefined
    return f"{value:.{metric.digits}f}" if isinstance(value, (int, float)) else format_interval(value, metric.digits)


def markdown(columns: Sequence[str], rows: Sequence[Sequence]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in (columns, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(columns), *lines[1:]]) + "\n"


def table(summary: dict, kind: str) -> str:
    """The settings of a suite as a "brief", "report" or "details" table, under a line that says where and how often."""
    shown = columns(kind, summary["rows"])
    rows = [[name, *(column.cell(row) for column in shown)] for name, row in summary["rows"].items()]
    return f"{conditions(summary)}\n\n" + markdown(["setting", *(column.title for column in shown)], rows)


def conditions(summary: dict) -> str:
    """Model if it is not the shipped one, number of runs, machine, and what the figures are."""
    n, prompts = summary["n"], summary.get("prompts", summary["n"])
    each, noises = n // prompts, summary.get("noises")
    runs = f"{n}: {prompts} held-out prompts x {each} noises" if each > 1 else amount(n, "held-out prompt")
    if noises == each and prompts > 1:
        runs += ", the same for all" if each > 1 else ", all from one noise"
    elif noises == n > 1:
        runs += ", each from noise of its own"
    figures = "means with 95 % bootstrap intervals, speed-up: median and 5-95 % range"
    model = summary.get("model", TINY)
    of = "" if model == TINY else f"{Path(model).name}, "
    return f"{of}n = {runs}, {machine(summary)}; {figures}"


def machine(found: dict) -> str:
    """On what something was measured: "cpu, 1 thread, float32"."""
    return f"{found['device']}, {amount(found['threads'], 'thread')}, {found['dtype']}"


def pairs_table(summary: dict) -> str:
    """The pairs of a suite as a Markdown table; an interval without 0 is a difference that these prompts show."""
    shown = [m for m in METRICS.values() if "pairs" in m.shown_in and any(m.name in p for p in summary["pairs"])]
    head = ["A", "B", "speed of A / B", *(f"{metric.title}, A - B" for metric in shown)]
    rows = [
        [pair["a"], pair["b"], f"{pair['speed']:.2f}", *(cell(metric, pair.get(metric.name)) for metric in shown)]
        for pair in summary["pairs"]
    ]
    return markdown(head, rows)
