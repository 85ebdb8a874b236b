"""VMAF and XPSNR by ffmpeg: they fall with the distortion, and are None where they cannot be measured."""

import numpy as np
import pytest

from accel.errors import AccelError
from accel.evaluation import ffmpeg_metrics as module
from accel.evaluation.ffmpeg_metrics import vmaf, xpsnr


def clip(size: tuple[int, int] = (48, 64), frames: int = 5) -> np.ndarray:
    """A bright square that moves over a gradient."""
    video = np.zeros((frames, *size, 3), np.uint8)
    video[:] = np.linspace(20, 120, size[1], dtype=np.uint8)[None, None, :, None]
    for i, frame in enumerate(video):
        frame[10:26, 4 + 3 * i : 20 + 3 * i] = (230, 200, 40)
    return video


def noisy(video: np.ndarray, strength: float) -> np.ndarray:
    noise = np.random.default_rng(0).normal(0, strength, video.shape)
    return (video + noise).clip(0, 255).astype(np.uint8)


def test_equal_videos_score_high_and_more_noise_scores_lower():
    video = clip()
    scores = [vmaf(video, noisy(video, strength) if strength else video) for strength in (0, 8, 40)]
    assert scores[0] > 95 and scores[0] > scores[1] > scores[2] >= 0


def test_xpsnr_falls_with_noise_and_errors_in_texture_count_less():
    video = clip()
    assert xpsnr(video, video) is None
    assert xpsnr(video, noisy(video, 4)) > xpsnr(video, noisy(video, 30)) > 0
    flat = np.full_like(video, 128)
    textured = noisy(flat, 30)
    shifted = lambda base: np.where(np.arange(base.shape[2])[:, None] % 2, base, base + 2).astype(np.uint8)
    assert xpsnr(textured.clip(0, 250), shifted(textured.clip(0, 250))) > xpsnr(flat, shifted(flat)) + 3
    assert xpsnr(textured, flat) > xpsnr(flat, textured) + 3  # the texture that counts is the reference's
    assert xpsnr(np.zeros_like(video), np.full_like(video, 255)) < 0


@pytest.mark.parametrize("size, frames", [((16, 16), 1), ((15, 33), 2), ((200, 240), 3)])
def test_small_odd_and_large_frames_are_measured(size, frames):
    assert vmaf(clip(size, frames), clip(size, frames)) > 90


def test_the_first_video_is_the_reference():
    video = clip()
    blurred = (video.astype(float) + np.roll(video, 1, 2) + np.roll(video, 2, 2)) / 3
    assert vmaf(video, blurred.astype(np.uint8)) != vmaf(blurred.astype(np.uint8), video)


def test_without_ffmpeg_or_its_filter_there_is_no_score(monkeypatch):
    monkeypatch.setattr(module, "_graph", lambda *_: "[0:v]nosuchfilter")
    assert vmaf(clip(), clip()) is None

    def missing():
        raise AccelError("ffmpeg was not found")

    monkeypatch.setattr(module, "find_ffmpeg", missing)
    assert vmaf(clip(), clip()) is None
