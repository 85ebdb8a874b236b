"""The overhead of neutral methods: pairs of a run of the stock pipeline and one inside `accel.apply`."""

from math import log

import pytest
from families.tiny import TINY

from accel.evaluation import overhead
from accel.methods import METHODS


def test_which_run_comes_first_alternates_and_its_time_is_told_in_parts_of_the_stock_runs(monkeypatch):
    pipe, inputs = TINY["wan"]()
    order, times = [], iter([0, 9, 10, 14, 20, 22, 30, 35, 40, 50])  # a run to begin with, and two pairs
    stock = type(pipe).__call__

    def call(self, *args, **named):
        hook = getattr(pipe.transformer, "_diffusers_hook", None)
        order.append("ours" if hook and hook.hooks else "stock")
        return stock(self, *args, **named)

    monkeypatch.setattr(type(pipe), "__call__", call)
    monkeypatch.setattr("accel.core.calls.synchronized_time", lambda device: next(times))
    neutral = [METHODS[name](**METHODS[name].neutral) for name in ("fastercache", "stepcache")]
    assert overhead.overheads(pipe, inputs, neutral, 2) == pytest.approx([log(4 / 2), log(10 / 5)])
    assert order == ["ours", "ours", "stock", "stock", "ours"]
