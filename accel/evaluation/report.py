"""What the measurements of a suite come to: rows with intervals, rows held against each other, a table, a plot."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from ..world.scene import ATTRIBUTES
from .metrics import RATIOS
from .stats import format_interval, interval

PAIRED_METRICS: dict[str, Callable[[dict], float]] = {  # what rows are held against each other by
    "adherence": lambda r: r["adherence"]["mean"],
    "ssim": lambda r: r["ssim"],
    "latent_nmse": lambda r: r["latent_nmse"],
}

COLUMNS: dict[str, Callable[[dict], str]] = {  # of a table: how a row's figures are spelled
    "denoise s": lambda r: f"{r['seconds']:.2f}",
    "speed-up": lambda r: "{:.2f} [{:.2f}, {:.2f}]".format(r["speedup"], *r["speedup_range"]),
    "work": lambda r: f"{r['work']:.2f}",
    "efficiency": lambda r: f"{r['efficiency']:.2f}",
    "SSIM": lambda r: format_interval(r["ssim"], 4),
    "worst": lambda r: f"{r['ssim_worst']:.3f}",
    "PSNR dB": lambda r: format_interval(r["psnr"], 1) if r["psnr"] else "equal",
    "adherence": lambda r: format_interval(r["adherence"]) if "adherence" in r else "-",
    "- baseline": lambda r: format_interval(r["difference"]) if "difference" in r else "-",
}
BRIEF = ("denoise s", "speed-up", "efficiency", "SSIM", "adherence", "- baseline")


def summarise(lines: Sequence[dict], pairs: Sequence[tuple[str, str]] = ()) -> dict:
    """Per row: medians of time and speed, work, and means of quality with 95 % bootstrap intervals.

    `pairs`: names of rows that are held against each other, prompt by prompt. Seeds of one prompt are averaged before
    anything is drawn, as they are not independent.
    """
    by_prompt: dict[str, list[dict]] = {}
    for line in lines:
        by_prompt.setdefault(line["prompt"], []).append(line["rows"])
    groups = list(by_prompt.values())
    names = list(lines[0]["rows"])
    rows = {name: _row(groups, name, names[0]) for name in names}
    held = [_held(groups, a, b) for a, b in pairs if a in rows and b in rows]
    return {"n": len(lines), "prompts": len(groups), "rows": rows, "pairs": held}


def _each(groups: list[list[dict]], value: Callable[[dict], float]) -> list[float]:
    """A value of all rows at once, averaged over the seeds of each prompt."""
    return [float(np.mean([value(rows) for rows in group])) for group in groups]


def _row(groups: list[list[dict]], name: str, first: str) -> dict:
    own, base = ([rows[n] for group in groups for rows in group] for n in (name, first))
    mean = lambda value: interval(_each(groups, lambda rows: value(rows[name])))
    speed = [b["denoise"] / r["denoise"] for r, b in zip(own, base)]
    work = float(np.median([r["flops"] / b["flops"] for r, b in zip(own, base)]))
    row = {
        "seconds": float(np.median([r["denoise"] for r in own])),
        "decode": float(np.median([r["decode"] for r in own])),
        "speedup": float(np.median(speed)),
        "speedup_range": [float(q) for q in np.quantile(speed, (0.05, 0.95))],
        "work": work,
        "efficiency": float(np.median(speed)) * work,
        "ssim": mean(lambda r: r["ssim"]),
        "ssim_worst": min(r["ssim_worst"] for r in own),
        "psnr": _psnr(groups, name),
    }
    for ratio in [key for key in RATIOS if all(key in r for r in own)]:
        row[ratio] = mean(lambda r, ratio=ratio: r[ratio])
    if own[0]["adherence"]:
        row["adherence"] = mean(PAIRED_METRICS["adherence"])
        row["difference"] = _less(groups, name, first, PAIRED_METRICS["adherence"])
        row["attributes"] = {a: mean(lambda r, a=a: r["adherence"][a]) for a in ATTRIBUTES}
    return row


def _psnr(groups: list[list[dict]], name: str) -> tuple[float, float, float] | None:
    """Of the videos that are not equal to the first row's; None if all are."""
    found = [[r[name]["psnr"] for r in group if r[name]["psnr"] is not None] for group in groups]
    means = [float(np.mean(group)) for group in found if group]
    return interval(means) if means else None


def _less(groups: list[list[dict]], a: str, b: str, value: Callable[[dict], float]) -> tuple[float, float, float]:
    """A value of row a less that of row b, prompt by prompt."""
    return interval(_each(groups, lambda rows: value(rows[a]) - value(rows[b])))


def _held(groups: list[list[dict]], a: str, b: str) -> dict:
    """Row a less row b by each of the marks that both have."""
    marks = {mark: value for mark, value in PAIRED_METRICS.items() if groups[0][0][a].get(mark) not in (None, {})}
    less = {mark: _less(groups, a, b, value) for mark, value in marks.items()}
    faster = float(np.median([rows[b]["denoise"] / rows[a]["denoise"] for group in groups for rows in group]))
    return {"a": a, "b": b, "speed": faster, **less}


def table(summary: dict, columns: Iterable[str] = COLUMNS) -> str:
    """The rows as a Markdown table with some of the `COLUMNS`."""
    where = f"{summary['device']}, {summary['threads']} threads, {summary['dtype']}"
    columns = list(columns)
    lines = [
        f"{_count(summary)}, {where}; means with 95 % bootstrap intervals, speed-up: median and 5-95 % range\n",
        f"| setting | {' | '.join(columns)} |",
        f"|---|{'---|' * len(columns)}",
        *(f"| {name} | {' | '.join(COLUMNS[c](row) for c in columns)} |" for name, row in summary["rows"].items()),
    ]
    return "\n".join(lines) + "\n"


def _count(summary: dict) -> str:
    prompts = summary.get("prompts", summary["n"])
    seeds = "" if prompts == summary["n"] else f": {prompts} prompts x {summary['n'] // prompts} seeds"
    return f"n = {summary['n']} held-out prompts and seeds{seeds}"


def paired(summary: dict) -> str:
    """The pairs as a Markdown table; an interval without 0 is a difference that these prompts show."""
    lines = ["| this | less that | its speed | adherence | SSIM | latent error |", "|---|---|---|---|---|---|"]
    for pair in summary["pairs"]:
        marks = " | ".join(format_interval(pair[mark]) if mark in pair else "-" for mark in PAIRED_METRICS)
        lines.append(f"| {pair['a']} | {pair['b']} | {pair['speed']:.2f} | {marks} |")
    return "\n".join(lines) + "\n"


def plot(summary: dict, path: Path) -> None:
    """Speed against likeness, one point a row."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4))
    for name, row in summary["rows"].items():
        mean, low, high = row["ssim"]
        axes.errorbar(row["speedup"], mean, yerr=[[mean - low], [high - mean]], fmt="o", capsize=3)
        axes.annotate(name, (row["speedup"], mean), textcoords="offset points", xytext=(6, 6))
    axes.set(xlabel="measured speed-up of the denoising", ylabel="SSIM to the baseline", title=f"n = {summary['n']}")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)
