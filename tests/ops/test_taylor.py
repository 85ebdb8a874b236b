"""The Taylor cache: what the series gives, and when it starts anew."""

import pytest
import torch

from accel.ops.taylor import TaylorCache


def line(position: float, slope: float = 3.0) -> torch.Tensor:
    return torch.full((1, 2, 3), 2.0 + slope * position)


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("positions", [(0, 2, 5, 9), (-7.0, -4.5, -3.5, 1.25)], ids=["steps", "log SNR"])
def test_a_feature_linear_in_the_position_is_continued_exactly(positions, order):
    cache, slope = TaylorCache(), 3.0 * (order > 0)
    for position in positions[:3]:
        cache.refresh(position, line(position, slope), order)
    assert len(cache.terms) == order + 1 and cache.nbytes == (order + 1) * 6 * 4
    torch.testing.assert_close(cache.extrapolate(positions[3]), line(positions[3], slope))


def test_a_feature_computed_twice_at_one_position_replaces_the_first():
    cache = TaylorCache()
    for value in (1.0, 2.0):
        cache.refresh(4, torch.full((1, 2, 3), value), 1)
    assert torch.equal(cache.extrapolate(6), torch.full((1, 2, 3), 2.0))


def test_a_feature_of_another_shape_starts_a_new_series():
    cache, wider = TaylorCache(), torch.ones(1, 4, 3)
    assert not cache.fits(wider)
    cache.refresh(0, line(0), 1)
    assert not cache.fits(wider)
    cache.refresh(1, wider, 1)
    assert cache.fits(wider) and torch.equal(cache.extrapolate(5), wider)


def test_the_best_share_of_a_trend_is_what_continued_of_it():
    """From 1 at 0 to 3 at 1 the trend is 2; at 3 it would have reached 7, and 5.5 is five eighths of the way."""
    cache, x = TaylorCache(), torch.ones(1, 4, 3)
    assert cache.best_share(0, x) is None
    cache.refresh(0, 1 * x, 1)
    assert cache.best_share(1, 3 * x) is None
    cache.refresh(1, 3 * x, 1)
    assert cache.best_share(3, 5.5 * x) == 0.625 and cache.best_share(1, x) is None
    assert cache.best_share(3, x[:, :2]) is None
    cache.refresh(2, 3 * x, 1)
    assert cache.best_share(3, 9 * x) == 0  # without a trend, no share of it leads anywhere


def test_each_sample_of_a_batch_goes_its_own_share_of_the_way():
    """Trends of 2 and 4, of which a half and a quarter continue."""
    cache, x = TaylorCache(), torch.tensor([1.0, 2.0]).view(2, 1, 1).expand(2, 4, 3)
    cache.refresh(0, 1 * x, 1)
    cache.refresh(1, 3 * x, 1)
    share = cache.best_share(2, 3 * x + torch.tensor([1.0, 1.0]).view(2, 1, 1))
    assert share.flatten().tolist() == [0.5, 0.25]
    assert torch.equal(cache.extrapolate(2, share), 3 * x + 1)


def test_of_differences_that_alternate_a_part_cancels_out():
    """Features on the line of slope 1, but for an error of 1 that changes its sign: differences 3, -1, 3."""
    cache, x = TaylorCache(), torch.ones(1, 4, 3)
    for position, value in enumerate((-1.0, 2.0, 1.0, 4.0)):
        cache.refresh(position, value * x, 1, newest=0.75)
    assert torch.equal(cache.terms[1], 2.25 * x)  # 0.75 * 3 + 0.25 * (0.75 * -1 + 0.25 * 3)
