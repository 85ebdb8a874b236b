"""Frequency bands by hand."""

import pytest
import torch

from accel.ops.spectrum import estimate_signal, low_pass, split


@pytest.mark.parametrize("h, w", [(8, 8), (9, 7), (12, 20), (60, 104)])
def test_bands_sum_to_the_input(h, w):
    x = torch.randn(2, 3, h, w, generator=torch.Generator().manual_seed(0))
    low, high = split(x)
    torch.testing.assert_close(low + high, x)


def test_a_constant_is_low_and_a_checkerboard_is_high():
    y, x = torch.meshgrid(torch.arange(10), torch.arange(10), indexing="ij")
    board = (-1.0) ** (x + y)
    low, high = split(3 + board)
    torch.testing.assert_close(low, torch.full((10, 10), 3.0))
    torch.testing.assert_close(high, board)


def test_frequencies_exactly_on_the_radius_are_low():
    """Radius 5 on 60 rows: (3, 4) and (4, 3) lie on it, (4, 4) does not."""
    mask = low_pass(60, 104, 5)
    assert mask[3, 4] and mask[4, 3] and mask[5, 0] and mask[57, 4] and not mask[4, 4]


def test_the_estimate_of_a_clean_signal_keeps_coarse_frequencies_of_noise_and_all_of_a_signal():
    x = torch.randn(1, 2, 5, 6, 7, generator=torch.Generator().manual_seed(0))
    assert (estimate_signal(x, 1.0, 0.0) - x).abs().max() < 1e-5  # no noise: the gain is the same everywhere
    coarse = estimate_signal(x, 0.0, 1.0)  # noise alone: only the mean is left
    torch.testing.assert_close(coarse, coarse.mean((-3, -2, -1), keepdim=True).expand_as(x))
    torch.testing.assert_close(coarse[..., 0, 0, 0], x.mean((-3, -2, -1)) * 5 * 6 * 7, rtol=1e-3, atol=1e-3)


def test_the_gain_of_the_estimate_is_that_of_a_wiener_filter_along_each_axis():
    """A wave of frequency 1/4 along one axis of 8: gain a / (a^2 + b^2 / 64) over its mean."""
    wave = torch.cos(torch.pi / 2 * torch.arange(8.0)).expand(1, 1, 8)
    gain = lambda frequency: 0.5 / (0.25 + 0.25 * frequency**3)
    mean = sum(gain(abs(k) / 8) for k in range(-4, 4)) / 8
    torch.testing.assert_close(estimate_signal(wave, 0.5, 0.5), wave * gain(1 / 4) / mean)
