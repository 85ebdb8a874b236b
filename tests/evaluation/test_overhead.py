"""The overhead of neutral methods: pairs of a run of the stock pipeline and one inside `accel.apply`."""

import itertools
from collections.abc import Iterator

import pytest
from families.tiny import TINY

from accel.evaluation import overhead
from accel.methods import METHODS


def test_extra_seconds_of_small_runs_are_told_in_parts_of_a_full_one_and_which_comes_first_alternates(monkeypatch):
    pipe, inputs = TINY["wan"]()
    # The seconds: five runs of the full size, one to begin with, and two pairs.
    order, sizes, times = [], [], clock(100, 100, 90, 200, 100, 9, 4, 2, 5, 10)
    stock = type(pipe).__call__

    def call(self, *args, **named):
        hook = getattr(pipe.transformer, "_diffusers_hook", None)
        order.append("ours" if hook and hook.hooks else "stock")
        sizes.append(named["height"])
        return stock(self, *args, **named)

    monkeypatch.setattr(type(pipe), "__call__", call)
    monkeypatch.setattr("accel.core.calls.synchronized_time", lambda device: next(times))
    neutral = [METHODS[name](**METHODS[name].neutral) for name in ("fastercache", "stepcache")]
    found = overhead.overheads(pipe, {**inputs, "height": 32}, {"height": 16}, neutral, 2)
    assert found == pytest.approx([0.02, 0.05])
    assert order == ["stock"] * 5 + ["ours", "ours", "stock", "stock", "ours"]
    assert sizes == [32] * 5 + [16] * 5


def clock(*spent: float) -> Iterator[float]:
    """The readings of a clock at the beginning and end of runs that take so many seconds."""
    return itertools.chain.from_iterable((0, seconds) for seconds in spent)
