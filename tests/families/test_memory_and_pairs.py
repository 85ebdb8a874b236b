"""Memory estimates of every pipeline, and two caches together."""

import pytest
from families.test_contract import CACHING, METHODS, PREDICTING, REDUCING, WITHOUT_STACK, all_but, sample, stock
from families.tiny import TINY

import accel


@pytest.mark.parametrize("name", all_but())
def test_peak_memory_is_at_most_the_estimate(name):
    pipe, inputs = TINY[name]()
    for method in (CACHING, REDUCING, METHODS["asymrnr"](), *(() if name in WITHOUT_STACK else (PREDICTING,))):
        with accel.apply(pipe, method) as trace:
            sample(pipe, inputs, name)
        assert 0 < trace.summary()["peak_bytes"] <= trace.summary()["estimated_bytes"]


@pytest.mark.parametrize("name", all_but(*WITHOUT_STACK))
def test_fastercache_and_disca_together_err_little_more_than_each(name):
    pipe, inputs = TINY[name]()
    errors = []
    for methods in ([CACHING], [PREDICTING], [PREDICTING, CACHING]):
        with accel.apply(pipe, methods):
            errors.append((sample(pipe, inputs, name) - stock(name)).abs().max())
    assert errors[2] < 3 * (errors[0] + errors[1])
