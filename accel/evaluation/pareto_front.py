"""Which measured settings are worth having: none is both faster and better, or the fastest within a loss."""

from __future__ import annotations

from collections.abc import Sequence

MAX_ADHERENCE_LOSS = 0.01  # of a setting of a search against the baseline
PERFECT = {"ssim": 1.0, "ssim_worst": 1.0, "vmaf": 100.0}  # what a video has that equals its reference


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points (x, y) that no other point beats, in the order of x; more is better in both.

    A point beats another one if it is better in x or y and not worse in the other.
    """
    front, best = [], float("-inf")
    for i in sorted(range(len(points)), key=lambda i: points[i], reverse=True):
        if points[i][1] > best or (front and points[i] == points[front[-1]]):
            front.append(i)
            best = points[i][1]
    return sorted(front, key=lambda i: (points[i][0], i))


def is_as_fast(speed: float, wanted: float) -> bool:
    """Whether a speed is the wanted one or more; one over a counted share may miss a whole number by its rounding."""
    return speed > wanted - 1e-9


def loss(row: dict, metric: str = "ssim") -> float | None:
    """How much of a metric a row has lost against its reference; None if that is not defined."""
    best, value = PERFECT.get(metric, row.get(f"{metric}_a")), row.get(metric, row.get(f"{metric}_b"))
    if best is None or value is None:
        return None
    return 0.0 if row.get("bit_equal") else best - value  # VMAF finds 97 to 100 in equal videos


def fastest_within(rows: Sequence[dict], max_loss: float, metric: str = "ssim") -> int | None:
    """Index of the row with the highest "speedup" that loses at most `max_loss` of a metric; None if all lose more."""
    losses = [loss(row, metric) for row in rows]
    within = [i for i, lost in enumerate(losses) if lost is not None and lost <= max_loss + 1e-9]
    return max(within, key=lambda i: (rows[i]["speedup"], -losses[i]), default=None)


def tuned_within(rows: Sequence[dict], max_loss: float) -> dict | None:
    """The fastest row of `accel tune` within a loss of SSIM and with about the baseline's adherence, if any."""
    keep = [row for row in rows if keeps_adherence(row)]
    best = fastest_within([{**row, "speedup": row["speed"]} for row in keep], max_loss)
    return None if best is None else keep[best]


def keeps_adherence(row: dict) -> bool:
    """Whether a row of `accel tune` has about the baseline's adherence."""
    return row.get("adherence_loss", 0) <= MAX_ADHERENCE_LOSS
