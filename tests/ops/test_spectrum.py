"""Frequency bands by hand."""

import pytest
import torch

from accel.ops.spectrum import low_pass, split


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
