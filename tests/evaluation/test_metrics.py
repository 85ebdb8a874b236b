"""Quality metrics by hand, and the registry: one entry appears in run.json, bench results and tables."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from accel.evaluation import metrics
from accel.evaluation.metrics import METRICS, Metric, Pair, measure, metric_texts, metrics_of, report_metrics
from accel.evaluation.report import pairs_table, summarize, table
from accel.runtime.models import TINY, ModelDefaults, read_defaults

CONDITIONS = {"device": "cpu", "threads": 1, "dtype": "float32"}


def video(frames, latents=None):
    return SimpleNamespace(frames=frames, latents=torch.ones(1, 4, 3, 8, 8) if latents is None else latents)


def grey(level, f=3):
    return np.full((f, 16, 16, 3), level, np.uint8)


def test_equal_videos_are_bit_equal_and_one_level_off_is_48_db():
    pair = lambda level: Pair(video(grey(100)), video(grey(level)), "-")
    assert (
        pair(100).bit_equal and METRICS["psnr"].measure(pair(100)) is None and METRICS["ssim"].measure(pair(100)) == 1
    )
    assert not pair(101).bit_equal and METRICS["psnr"].measure(pair(101)) == pytest.approx(20 * np.log10(255))


def test_worst_frame_is_the_worst():
    a = np.random.default_rng(0).integers(0, 255, (3, 16, 16, 3), dtype=np.uint8)
    b = a.copy()
    b[1] = 255 - b[1]
    pair = Pair(video(a), video(b), "-")
    assert METRICS["ssim_worst"].measure(pair) == pair.ssim_frames[1] < 0 < pair.ssim_frames[0]


def test_texture_is_measured_where_the_prompt_names_a_living_one(monkeypatch):
    asked = []
    monkeypatch.setattr(
        "accel.world.texture_stats.texture_distance", lambda frames, pattern: asked.append(pattern) or 1
    )
    measured = [
        METRICS["texture"].measure(
            Pair(video(grey(1)), video(grey(2)), f"a red ball floats over a {pattern} background")
        )
        for pattern in ("marbled white", "striped navy", "plain gray")
    ]
    assert measured == [1, None, None] and asked == ["marbled"]


def test_latent_error_is_relative_to_the_baseline():
    latents = torch.randn(1, 4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    pair = Pair(video(grey(1), latents), video(grey(1), 1.5 * latents), "-")
    assert METRICS["latent_nmse"].measure(pair) == pytest.approx(0.25)
    assert METRICS["spatial_hf"].measure(pair) == pytest.approx(2.25)
    assert METRICS["temporal_hf"].measure(pair) == pytest.approx(2.25)


def test_motion_is_the_mean_change_and_undefined_if_the_baseline_stands_still():
    steps = lambda *levels: video(np.concatenate([grey(level, 1) for level in levels]))
    assert METRICS["motion_ratio"].measure(Pair(steps(0, 2, 4), steps(0, 1, 2), "-")) == 0.5
    assert METRICS["motion_ratio"].measure(Pair(steps(7, 7), steps(0, 1), "-")) is None


def test_flicker_is_what_changes_back_and_saturation_the_span_of_the_colours():
    steps = lambda *levels: video(np.concatenate([grey(level, 1) for level in levels]))
    assert METRICS["flicker"].measure(Pair(steps(0, 4, 0), steps(0, 2, 0), "-")) == 0.5
    assert METRICS["flicker"].measure(Pair(steps(0, 4, 0), steps(0, 4, 8), "-")) == 0  # it moves on
    assert METRICS["flicker"].measure(Pair(steps(0, 4), steps(0, 4), "-")) is None
    colour = lambda *rgb: video(np.full((2, 16, 16, 3), rgb, np.uint8))
    assert METRICS["saturation_ratio"].measure(Pair(colour(90, 50, 50), colour(130, 70, 110), "-")) == 1.5
    assert METRICS["saturation_ratio"].measure(Pair(video(grey(9)), colour(9, 8, 7), "-")) is None


def test_videos_of_different_shapes_have_no_similarity():
    values = measure(Pair(video(grey(1)), video(grey(1, 5)), "-"), [m for m in METRICS.values() if not m.of_one_video])
    assert set(values.values()) == {None}


def test_a_model_names_its_extra_metrics_and_an_unknown_one_is_refused():
    names = lambda *extra: [m.name for m in metrics_of(ModelDefaults(metrics=extra))]
    assert "adherence" not in names() and "adherence" in names("adherence")
    assert read_defaults(TINY).metrics == ("adherence", "texture")
    with pytest.raises(ValueError, match="unknown metric 'beauty'; there are ssim"):
        names("beauty")


def test_metrics_that_a_model_does_not_have_are_none_in_run_json():
    report = report_metrics(Pair(video(grey(1)), video(grey(2)), "-"), metrics_of(ModelDefaults()))
    assert report["adherence_a"] is report["adherence_b"] is None and report["attributes"] == {"a": {}, "b": {}}
    assert not any("read back" in about for _, about in metric_texts(report))


def test_vmaf_is_measured_for_pairs_and_shown_where_there_is_a_score(monkeypatch):
    for score, shown in ((87.65, [("87.7", "VMAF to the baseline, of 100")]), (None, [])):
        monkeypatch.setattr("accel.evaluation.ffmpeg_metrics.vmaf", lambda reference, frames, score=score: score)
        report = report_metrics(Pair(video(grey(1)), video(grey(2)), "-"), metrics_of(ModelDefaults()))
        assert report["vmaf"] == score and [text for text in metric_texts(report) if "VMAF" in text[1]] == shown


def test_a_video_that_is_too_small_for_the_judge_is_not_judged():
    report = report_metrics(Pair(video(grey(1)), video(grey(2)), "-"), metrics_of(ModelDefaults(metrics=["adherence"])))
    assert (report["adherence_a"], report["adherence_b"], report["attributes"]) == (None, None, {"a": {}, "b": {}})
    assert not any("read back" in about for _, about in metric_texts(report))


def test_a_video_that_is_not_square_is_not_judged():
    wide = video(np.full((2, 96, 128, 3), 90, np.uint8))
    pair = Pair(wide, wide, "a big red star spins slowly over a cloudy navy background")
    assert METRICS["adherence"].measure(pair) is None and METRICS["texture"].measure(pair) is None


def test_videos_of_different_sizes_are_not_called_bit_equal():
    texts = lambda bit_equal: metric_texts({"psnr": None, "ssim": None, "bit_equal": bit_equal})
    assert ("bit-equal", METRICS["psnr"].about) in texts(True)
    assert "bit-equal" not in dict(texts(None))


def test_the_page_says_which_attributes_are_not_seen(monkeypatch):
    read = {"shape": 0.0, "colour": 1.0, "mean": 0.5}
    monkeypatch.setattr("accel.world.judge.score", lambda frames, prompt: read)
    large = video(np.zeros((3, 48, 48, 3), np.uint8))
    report = report_metrics(Pair(large, large, "-"), metrics_of(ModelDefaults(metrics=["adherence"])))
    assert (report["adherence_a"], report["adherence_b"]) == (0.5, 0.5)
    assert ("50%", "of the prompt read back, baseline 50%; not seen: shape") in metric_texts(report)


@pytest.fixture
def brightness(monkeypatch):
    """A new metric, as one entry of the registry."""
    entry = Metric(
        "brightness", "brightness", "mean grey level", lambda pair: float(pair.video.frames.mean()),
        higher_is_better=True, digits=1, text="{:.0f}", of_one_video=True,
        shown_in=frozenset({"brief", "report", "details", "pairs", "page"}),
    )  # fmt: skip
    monkeypatch.setitem(metrics.METRICS, entry.name, entry)
    return entry


def test_a_new_metric_is_one_entry(brightness):
    baseline, brighter = video(grey(100)), video(grey(130))
    report = report_metrics(Pair(baseline, brighter, "-"), metrics_of(ModelDefaults()))
    assert (report["brightness_a"], report["brightness_b"]) == (100, 130)  # run.json
    assert ("130", "mean grey level, baseline 100") in metric_texts(report)  # the page
    speed = {"denoise": 1.0, "baseline_denoise": 1.0, "decode": 0.1, "flops": 8}
    row = lambda shown: {**speed, **measure(Pair(baseline, shown, "-"), metrics_of(ModelDefaults()))}
    rows = {"baseline": row(baseline), "brighter": row(brighter)}  # results.jsonl
    assert rows["brighter"]["brightness"] == 130
    summary = {**CONDITIONS, **summarize([{"prompt": "p", "rows": rows}], [("brighter", "baseline")])}
    assert summary["rows"]["brighter"]["brightness_delta"] == (30, 30, 30)  # results.json
    assert json.dumps(summary)
    for kind in ("brief", "report", "details"):
        assert "| brightness | delta brightness |" in table(summary, kind)
        assert "130.0 [130.0, 130.0] | 30.0 [30.0, 30.0] |" in table(summary, kind)
    assert "brightness, A - B |" in pairs_table(summary) and "| 30.0 [30.0, 30.0] |" in pairs_table(summary)
