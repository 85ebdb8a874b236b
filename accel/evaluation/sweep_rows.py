"""What a sweep keeps of the report of a pair: its place on the axes, speed, work and quality."""

from __future__ import annotations

from statistics import median

from .metrics import METRICS
from .sweep import Cell


def row_of(cell: Cell, report: dict) -> dict:
    """The figures of a measured cell, from the content of its `run.json`."""
    return {"values": cell.values, "plain": cell.plain, "label": cell.label, **figures(report)}


def figures(report: dict) -> dict:
    """Seconds of denoising, speed-up, work ratio and the quality metrics of a report."""
    sides = {m.name: [f"{m.name}_{side}" for side in "ab"] if m.of_one_video else [m.name] for m in METRICS.values()}
    return {
        "seconds": median(report["b"]["denoise"]), "speedup": report["speedup_denoise"], "work": report["work_ratio"],
        "bit_equal": report["bit_equal"], **{key: report.get(key) for keys in sides.values() for key in keys},
    }  # fmt: skip
