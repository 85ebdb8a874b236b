"""Bands, distances and intervals, by hand."""

import numpy as np
import pytest
import torch

from accel.core.trace import Step, Trace
from accel.evaluation.metrics import distance
from accel.evaluation.stats import interval
from accel.ops.spectrum import low_pass, split


@pytest.mark.parametrize("h, w", [(8, 8), (9, 7), (12, 20), (60, 104)])
def test_bands_sum_to_the_whole(h, w):
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


def test_equal_videos_are_bit_equal_and_one_level_off_is_48_db():
    a = np.full((3, 16, 16, 3), 100, np.uint8)
    assert distance(a, a)["bit_equal"] and distance(a, a)["psnr"] is None and distance(a, a)["ssim"] == 1
    assert distance(a, a + 1)["psnr"] == pytest.approx(20 * np.log10(255))


def test_worst_frame_is_the_worst():
    a = np.random.default_rng(0).integers(0, 255, (3, 16, 16, 3), dtype=np.uint8)
    b = a.copy()
    b[1] = 255 - b[1]
    d = distance(a, b)
    assert d["ssim_worst"] == pytest.approx(d["ssim_frames"][1], abs=1e-5) and d["ssim_worst"] < 0 < d["ssim_frames"][0]


def test_interval_of_a_constant_has_no_width():
    assert interval([0.5] * 10) == (0.5, 0.5, 0.5)


def test_interval_of_many_is_that_of_the_normal_distribution():
    data = np.random.default_rng(1).normal(3, 2, 400)
    mean, low, high = interval(list(data))
    half = 1.96 * data.std() / 20
    assert (
        mean == data.mean()
        and low == pytest.approx(mean - half, abs=0.03)
        and high == pytest.approx(mean + half, abs=0.03)
    )


def test_work_by_hand():
    """Two calls of 100 FLOPs; the second skips one attention of 30: 170 of 200."""
    trace = Trace(flops={"denoiser": 100, "blocks.0.attn1": 30})
    for index in range(2):
        trace.record(Step(index, 2, 1.0, 0.5, "cond"), "denoiser", "compute")
    trace.record(Step(1, 2, 1.0, 0.5, "cond"), "blocks.0.attn1", "reuse")
    assert trace.flops_computed_and_full() == (170, 200)
