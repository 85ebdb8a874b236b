"""How noisy latents are: by hand, and at both ends of a run."""

import math

import pytest

from accel.ops.noise import log_snr


def test_the_log_signal_to_noise_ratio_is_finite_where_there_is_no_signal_or_no_noise():
    assert log_snr(0.75, 0.25) == pytest.approx(math.log(3))
    assert log_snr(0.0, 1.0) == pytest.approx(-math.log(1000)) == -log_snr(1.0, 0.0)


def test_two_steps_with_nearly_no_signal_are_equally_noisy():
    """Otherwise their tiny distance would be divided by."""
    assert log_snr(0.0, 1.0) == log_snr(0.0005, 0.9995) < log_snr(0.002, 0.998)
