"""Bootstrap intervals against what is known of them."""

import numpy as np
import pytest

from accel.evaluation.stats import format_interval, interval


def test_interval_of_a_constant_or_a_single_value_has_no_width():
    assert interval([0.5] * 10) == interval([0.5]) == (0.5, 0.5, 0.5)


def test_interval_of_many_values_is_that_of_the_normal_distribution():
    data = np.random.default_rng(1).normal(3, 2, 400)
    mean, low, high = interval(list(data))
    half = 1.96 * data.std() / 20
    assert mean == data.mean()
    assert low == pytest.approx(mean - half, abs=0.03) and high == pytest.approx(mean + half, abs=0.03)


def test_the_same_values_always_have_the_same_interval():
    data = list(np.random.default_rng(2).random(30))
    assert interval(data) == interval(data)


def test_an_interval_is_written_as_mean_and_bounds():
    assert format_interval((0.5, 0.4, 0.6), 2) == "0.50 [0.40, 0.60]"
