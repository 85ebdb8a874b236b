"""Means with bootstrap intervals."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def interval(values: list[float], seed: int = 0, draws: int = 2000) -> tuple[float, float, float]:
    """Mean and 95 % bootstrap interval of the mean."""
    data = np.asarray(values, dtype=float)
    means = np.random.default_rng(seed).choice(data, (draws, len(data))).mean(1)
    return float(data.mean()), *(float(q) for q in np.quantile(means, (0.025, 0.975)))


def format_interval(found: Sequence[float], digits: int = 3) -> str:
    """An `interval` as text: mean [low, high]."""
    return "{:.{d}f} [{:.{d}f}, {:.{d}f}]".format(*found, d=digits)
