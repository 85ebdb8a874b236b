"""Which group of settings is best at which speed: ours, diffusers' own caches (peers), or plain solvers in fewer steps.

Speed is by counted work, which no busy machine changes: at 2.5, a setting computes 1 / 2.5 of the baseline's FLOPs.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import log2
from pathlib import Path

from .metrics import METRICS
from .pareto_front import pareto_front
from .report import SPEED, cell, conditions, markdown, paired_differences
from .suites import NOISE_FLOOR

CLASSES = (1.5, 2, 2.5, 3.5, 5, 8, 12, 16)
OURS = "ours"  # the group that the others are compared with
Groups = dict[str, tuple[str, ...]]  # name -> its settings


def speed_of(row: dict) -> float:
    """How many times less than the baseline a summarized setting computes."""
    return 1 / row["work"]


def best_settings(rows: dict[str, dict], groups: Groups) -> list[dict]:
    """For each speed class, the setting of each group with the highest SSIM of those that are at least so fast.

    {"speed": 2.5, "best": {group: setting}}, without groups that have none.
    """
    found = []
    for speed in CLASSES:
        fast = {g: [n for n in names if n in rows and speed_of(rows[n]) > speed - 1e-9] for g, names in groups.items()}
        best = {g: max(names, key=lambda name: rows[name]["ssim"][0]) for g, names in fast.items() if names}
        found.append({"speed": speed, "best": best})
    return found


def pairs_of(classes: Sequence[dict]) -> list[tuple[str, str]]:
    """Ours with the best of each other group, in each class."""
    found = [(c["best"][OURS], other) for c in classes for g, other in c["best"].items() if g != OURS in c["best"]]
    return list(dict.fromkeys(found))


def hypervolume(points: Sequence[tuple[float, float]]) -> float:
    """Mean, over the logarithm of speeds 1 to the highest class, of the best quality that points (speed, quality) have.

    A point counts at its own speed and all lower ones; above the fastest point the quality is 0.
    """
    area, reached = 0.0, 0.0
    for i in pareto_front(points):
        place = log2(min(max(points[i][0], 1), CLASSES[-1]))
        area += (place - reached) * max(points[i][1], 0)
        reached = place
    return area / log2(CLASSES[-1])


def hypervolumes(rows: dict[str, dict], groups: Groups) -> dict[str, float]:
    """The hypervolume of SSIM of each group."""
    points = {g: [(speed_of(rows[n]), rows[n]["ssim"][0]) for n in names if n in rows] for g, names in groups.items()}
    return {group: hypervolume(found) for group, found in points.items()}


def with_front(summary: dict, cases: Sequence[dict], groups: Groups) -> dict:
    """A summary of `report.summarize` and, of its groups, the best of each class, their pairs and the hypervolumes."""
    rows = summary["rows"]
    groups = {group: known for group, names in groups.items() if (known := [n for n in names if n in rows])}
    classes = best_settings(rows, groups)
    pairs = summary["pairs"] + paired_differences(cases, pairs_of(classes))
    return {**summary, "pairs": pairs, "groups": groups, "classes": classes, "hypervolume": hypervolumes(rows, groups)}


def front_table(summary: dict) -> str:
    """The best of each group in each speed class, as Markdown."""
    rows = [[f"{c['speed']}x", *_cells(summary, c["best"], g)] for c in summary["classes"] for g in summary["groups"]]
    metrics = [METRICS[name] for name in ("ssim", "ssim_worst", "adherence")]
    titles = [
        "at least",
        "best of",
        "setting",
        "speed by work",
        "speed-up",
        *(m.title for m in metrics),
        "SSIM, ours - it",
    ]
    volumes = ", ".join(f"{group} {volume:.3f}" for group, volume in summary["hypervolume"].items())
    return (
        f"{conditions(summary)}. The best is that with the highest mean SSIM here, so its own SSIM is a little high; "
        f"this holds for all groups\n\n{markdown(titles, rows)}\n"
        f"Hypervolume, the best SSIM over speeds 1 to {CLASSES[-1]} (log scale), 0 above a group's fastest: {volumes}\n"
        f"\n{_floor(summary['rows'])}\n"
    )


def _floor(rows: dict[str, dict]) -> str:
    ssim, worst = (cell(METRICS[name], rows[NOISE_FLOOR][name]) for name in ("ssim", "ssim_worst"))
    return f"Noise floor, SSIM where 1 % of the baseline's initial noise is replaced: {ssim}, worst frame {worst}"


def _cells(summary: dict, best: dict[str, str], group: str) -> list[str]:
    if group not in best:
        return [group, "none is so fast", *["-"] * 6]
    name, ours = best[group], best.get(OURS)
    row = summary["rows"][name]
    metrics = [cell(METRICS[key], row.get(key)) for key in ("ssim", "ssim_worst", "adherence")]
    pair = next((p for p in summary["pairs"] if (p["a"], p["b"]) == (ours, name)), {})
    return [
        group,
        name,
        f"{speed_of(row):.2f}",
        SPEED["speed-up"](row),
        *metrics,
        cell(METRICS["ssim"], pair.get("ssim")),
    ]


def plot(summary: dict, path: Path) -> None:
    """1 - SSIM against speed by work as a PNG: the points of each group and its front; without groups, all settings."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5))
    for group, names in (summary.get("groups") or {name: [name] for name in summary["rows"]}).items():
        points = [(speed_of(row), row["ssim"][0]) for row in map(summary["rows"].get, names) if row["ssim"][0] < 1]
        if points:
            (dots,) = axes.plot(*zip(*[(x, 1 - y) for x, y in points]), "o", markersize=4, alpha=0.6, label=group)
            front = [points[i] for i in pareto_front(points)]
            axes.step(*zip(*[(x, 1 - y) for x, y in front]), where="pre", color=dots.get_color())
    if NOISE_FLOOR in summary["rows"]:
        axes.axhline(1 - summary["rows"][NOISE_FLOOR]["ssim"][0], color="grey", linestyle=":", label=NOISE_FLOOR)
    axes.set(
        xlabel="speed by counted work", ylabel="1 - SSIM to the baseline", xscale="log", yscale="log",
        title=f"n = {summary['n']}",
    )  # fmt: skip
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    axes.xaxis.set_minor_formatter(lambda x, _: f"{x:g}")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)
