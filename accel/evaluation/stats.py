"""Means with bootstrap intervals."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

RESAMPLES = 2000  # of the values, with replacement


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean of values (n,) and its 95 % percentile bootstrap interval (low, high); a single value has no width."""
    from scipy.stats import bootstrap

    data = np.asarray(values, dtype=float)
    mean = float(data.mean())
    if len(data) < 2:
        return mean, mean, mean
    found = bootstrap((data,), np.mean, n_resamples=RESAMPLES, method="percentile", rng=0).confidence_interval
    return mean, float(found.low), float(found.high)


def format_interval(interval: Sequence[float], digits: int = 3) -> str:
    """(mean, low, high) as text: mean [low, high]."""
    return "{:.{d}f} [{:.{d}f}, {:.{d}f}]".format(*interval, d=digits)
