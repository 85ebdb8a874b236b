"""Which group of settings is best at which speed: ours, diffusers' own caches (peers), or plain solvers in fewer steps.

Speed is by counted work, which no busy machine changes: at 2.5, a setting computes 1 / 2.5 of the baseline's FLOPs.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import log2
from pathlib import Path

from .metrics import METRICS
from .overhead import STEPS
from .pareto_front import is_as_fast, pareto_front
from .report import SPEED, cell, conditions, markdown, paired_differences
from .stats import interval
from .suites import NOISE_FLOOR

CLASSES = (1.5, 2, 2.5, 3.5, 5, 8, 12, 16)
OURS = "ours"  # the group that the others are compared with
SHOWN = ("ssim", "ssim_worst", "vmaf", "cvvdp", "lpips", "adherence")  # those that were measured
MAX_LABELS = 20
Groups = dict[str, Sequence[str]]  # name -> its settings
Point = tuple[float, float, str]  # speed, SSIM, label


def speed_of(row: dict) -> float:
    """How many times less than the baseline a summarized setting computes."""
    return 1 / row["work"]


def ranked_settings(rows: dict[str, dict], groups: Groups) -> list[dict]:
    """{"speed": 2.5, "ranked": {group: settings}} for each class: all that are at least so fast, highest SSIM first."""
    found = []
    for speed in CLASSES:
        fast = {group: [n for n in names if is_as_fast(speed_of(rows[n]), speed)] for group, names in groups.items()}
        ranked = {g: sorted(names, key=lambda n: -rows[n]["ssim"][0]) for g, names in fast.items() if names}
        found.append({"speed": speed, "ranked": ranked})
    return found


def finalists(rows: dict[str, dict], groups: Groups, count: int) -> set[str]:
    """The first `count` settings of each class and group."""
    ranked = [names for found in ranked_settings(rows, groups) for names in found["ranked"].values()]
    return {name for names in ranked for name in names[:count]}


def best_settings(rows: dict[str, dict], groups: Groups) -> list[dict]:
    """{"speed": 2.5, "best": {group: setting}} for each class: of those at least so fast, that of the highest SSIM."""
    ranked = ranked_settings(rows, groups)
    return [{"speed": c["speed"], "best": {g: names[0] for g, names in c["ranked"].items()}} for c in ranked]


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


def with_front(
    summary: dict, cases: Sequence[dict], groups: Groups, classes: Sequence[dict], overhead: Sequence[float]
) -> dict:  # fmt: skip
    """A summary of `report.summarize` and, of its groups, the best of each class, their pairs and the hypervolumes.

    `classes` are those of `best_settings`, `overhead` that of each pair of runs (see overhead.py). The pairs are ours
    with the best of each other group.
    """
    rows = summary["rows"]
    groups = {group: known for group, names in groups.items() if (known := [n for n in names if n in rows])}
    bests = [found["best"] for found in classes if OURS in found["best"]]
    pairs = dict.fromkeys((best[OURS], name) for best in bests for group, name in best.items() if group != OURS)
    chosen = {name for found in classes for name in found["best"].values()}
    points = {g: [(speed_of(rows[n]), rows[n]["ssim"][0]) for n in names if n in chosen] for g, names in groups.items()}
    return {
        **summary, "pairs": summary["pairs"] + paired_differences(cases, list(pairs)), "groups": groups,
        "classes": classes, "hypervolume": {group: hypervolume(found) for group, found in points.items()},
        "overhead": interval(overhead), "overhead_pairs": len(overhead),
    }  # fmt: skip


def front_table(summary: dict) -> str:
    """The best of each group in each speed class, as Markdown, and what is measured where no method acts."""
    rows = [[f"{c['speed']}x", *_cells(summary, c["best"], g)] for c in summary["classes"] for g in summary["groups"]]
    titles = ["at least (tuning prompts)", "best of", "setting", "speed by work", "speed-up"]
    titles += [METRICS[name].title for name in _shown(summary)]
    volumes = ", ".join(f"{group} {volume:.3f}" for group, volume in summary["hypervolume"].items())
    overhead, low, high = (f"{share:+.2%}" for share in summary["overhead"])
    return (
        f"{conditions(summary)}. Chosen by mean SSIM on other prompts: all {summary['tried']} settings on "
        f"{summary['tuning_prompts']}, then {summary['finalists']} finalists on {summary['final_prompts']}\n\n"
        f"{markdown([*titles, 'SSIM, ours - it; ours is closer for'], rows)}\n"
        f"Hypervolume, the best SSIM over log speeds from 1 to {CLASSES[-1]}, 0 above a group's fastest: {volumes}\n\n"
        f"{noise_floor(summary)}\n\n"
        f"Overhead of `apply` with methods at neutral settings, which are left out of the model: {overhead} "
        f"[{low}, {high}] of the stock pipeline's time, by the extra seconds in {summary['overhead_pairs']} pairs of "
        f"runs of {STEPS} steps in turn, of a video so small that they are seen\n"
    ) + "".join(f"\nNot measured: {why}\n" for why in dict.fromkeys(summary["refused"].values()))


def front_overview(summary: dict) -> str:
    """One row for each speed class, as Markdown: the best of each group with its SSIM, and how much ours is ahead."""
    others = [group for group in summary["groups"] if group != OURS]
    rows = []
    for found in summary["classes"]:
        best = found["best"]
        cells = [_overview_cell(best[group], summary["rows"][best[group]]) if group in best else "-"
                 for group in summary["groups"]]  # fmt: skip
        rows.append([f"{found['speed']}x", *cells, *(_cells(summary, best, group)[-1] for group in others)])
    titles = ["speed by work, at least", *summary["groups"]]
    titles += [f"{OURS} - {group}; {OURS} is closer for" for group in others]
    return f"{conditions(summary)}\n\n{markdown(titles, rows)}\n{noise_floor(summary)}\n"


def _overview_cell(name: str, row: dict) -> str:
    return f"{name} ({speed_of(row):.2f}x): {cell(METRICS['ssim'], row['ssim'])}"


def noise_floor(summary: dict) -> str:
    """How far videos of slightly other noise are from the baseline's, in a sentence."""
    ssim, worst = (cell(METRICS[name], summary["rows"][NOISE_FLOOR][name]) for name in SHOWN[:2])
    return (
        "Noise floor: the baseline itself, with 1 % (by amplitude) of other noise in its initial noise, has SSIM "
        f"{ssim}, worst frame {worst}"
    )


def _cells(summary: dict, best: dict[str, str], group: str) -> list[str]:
    if group not in best:
        return [group, "none is so fast", *["-"] * (3 + len(_shown(summary)))]
    row = summary["rows"][best[group]]
    pair = next((p for p in summary["pairs"] if (p["a"], p["b"]) == (best.get(OURS), best[group])), {})
    metrics = [cell(METRICS[name], row.get(name)) for name in _shown(summary)]
    ahead = cell(METRICS["ssim"], pair.get("ssim"))
    ahead += "; {} of {}".format(*pair["closer"]) if "closer" in pair else ""
    return [group, best[group], f"{speed_of(row):.2f}", SPEED["speed-up"](row), *metrics, ahead]


def _shown(summary: dict) -> list[str]:
    return [name for name in SHOWN if any(name in row for row in summary["rows"].values())]


def plot_summary(summary: dict, path: Path) -> None:
    """`plot` of the groups of a suite, or of all its settings."""
    rows = summary["rows"]
    groups = summary.get("groups") or {"settings": list(rows)}
    series = {g: [(speed_of(rows[n]), rows[n]["ssim"][0], n) for n in names] for g, names in groups.items()}
    floor = rows[NOISE_FLOOR]["ssim"][0] if NOISE_FLOOR in rows else None
    plot(series, path, "speed by counted work", f"n = {summary['n']}", floor)


def plot(series: dict[str, list[Point]], path: Path, xlabel: str, title: str = "", floor: float | None = None) -> None:
    """1 - SSIM against speed as a PNG, both on a logarithmic axis: the points of each series and its front.

    Points that equal the baseline are left out; up to `MAX_LABELS` are named. `floor` is an SSIM to draw a line at.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5))
    series = {name: [point for point in points if point[1] < 1] for name, points in series.items()}
    count = sum(map(len, series.values()))
    for name, points in series.items():
        front = [points[i] for i in pareto_front([point[:2] for point in points])]
        (dots,) = axes.plot([x for x, *_ in points], [1 - y for _, y, _ in points], "o", markersize=4, label=name)
        axes.step([x for x, *_ in front], [1 - y for _, y, _ in front], where="pre", color=dots.get_color())
        for x, y, label in points if count <= MAX_LABELS else ():
            axes.annotate(label, (x, 1 - y), textcoords="offset points", xytext=(5, 4), fontsize=6)
    if floor is not None:
        axes.axhline(1 - floor, color="grey", linestyle=":", label=NOISE_FLOOR)
    scale = "log" if count else "linear"  # without points there is no logarithmic axis
    axes.set(xlabel=xlabel, ylabel="1 - SSIM to the baseline", xscale=scale, yscale=scale, title=title)
    for set_format in (axes.xaxis.set_major_formatter, axes.xaxis.set_minor_formatter):
        set_format(lambda x, _: f"{x:g}")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)
