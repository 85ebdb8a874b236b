"""ColorVideoVDP and LPIPS, where their packages are installed: equal videos score best, and more noise scores worse."""

import numpy as np
import pytest

from accel.errors import AccelError
from accel.evaluation import metrics
from accel.evaluation.learned_metrics import cvvdp, lpips
from accel.evaluation.metrics import metrics_of
from accel.runtime.models import ModelDefaults


def clip() -> np.ndarray:
    """A bright square that moves over a gradient."""
    video = np.zeros((5, 48, 64, 3), np.uint8)
    video[:] = np.linspace(20, 120, 64, dtype=np.uint8)[None, None, :, None]
    for i, frame in enumerate(video):
        frame[10:26, 4 + 3 * i : 20 + 3 * i] = (230, 200, 40)
    return video


def noisy(strength: float) -> np.ndarray:
    noise = np.random.default_rng(0).normal(0, strength, clip().shape)
    return (clip() + noise).clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("installed", [True, False])
def test_a_metric_is_measured_only_where_its_package_is_installed(monkeypatch, installed):
    monkeypatch.setattr(metrics, "find_spec", lambda package: object() if installed else None)
    names = {metric.name for metric in metrics_of(ModelDefaults())}
    assert ({"cvvdp", "lpips"} <= names) == installed and "ssim" in names


def test_colorvideovdp_falls_with_noise_and_is_ten_for_equal_videos():
    pytest.importorskip("pycvvdp", reason="pip install cvvdp==0.5.7", exc_type=ImportError)
    scores = [cvvdp(clip(), noisy(strength), fps=8) for strength in (0, 8, 40)]
    assert scores[0] == pytest.approx(10) and scores[0] > scores[1] > scores[2]


def test_lpips_rises_with_noise_and_is_zero_for_equal_videos():
    pytest.importorskip("lpips", reason="pip install lpips==0.1.4", exc_type=ImportError)
    try:
        scores = [lpips(clip(), noisy(strength)) for strength in (0, 8, 40)]
    except AccelError as error:
        pytest.skip(str(error))
    assert scores[0] == pytest.approx(0, abs=1e-6) and scores[0] < scores[1] < scores[2]
