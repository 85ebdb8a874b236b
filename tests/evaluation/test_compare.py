"""Comparing a baseline with an accelerated run: who is generated, what the callbacks see, how speed is computed."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from accel.core.trace import Event, Trace
from accel.evaluation import compare as module
from accel.evaluation.compare import compare
from accel.runtime.generate import Video
from accel.runtime.models import ModelDefaults
from accel.runtime.preview import Race
from accel.runtime.run import build_run

DEFAULTS = ModelDefaults(height=16, width=16, frames=5, steps=4)
A = build_run(DEFAULTS, model="m", prompt="a red star")
B = build_run(DEFAULTS, model="m", prompt="a red star", methods={"fastercache": {}}, steps=10)


def video(run, seconds) -> Video:
    trace = Trace()
    trace.flops = {"denoiser": 10}
    for step in range(run.steps):
        trace.events[step, "cond", "denoiser"] = Event(step, "cond", "denoiser", "compute", 1.0)
    return Video(np.full((5, 16, 16, 3), 100, np.uint8), torch.ones(1, 4, 3, 2, 2), {"denoise": seconds}, trace)


@pytest.fixture
def generated(monkeypatch):
    """The runs that were generated; the baseline takes 4, 8, ... seconds, the other run 2, 2, ..."""
    seen = []

    def generate(run, pipe, defaults, on_step=None):
        seen.append(run)
        made = video(run, 2.0 if run.methods else 4.0 * seen.count(A))
        if on_step:
            on_step(run.steps, made.trace, made.latents)
        return made

    monkeypatch.setattr(module, "generate", generate)
    monkeypatch.setattr(module, "warm_up", lambda run, pipe, defaults, on_step=None: on_step and on_step(1, None, None))
    race = lambda recorder, pipe, total: Race(b"", [1], [total], total, 8, 16, 16)
    monkeypatch.setattr(module.RaceRecorder, "finish", race)
    monkeypatch.setattr(module, "environment", lambda pipe: {"device": "cpu", "threads": 1, "dtype": "float32"})
    return seen


def test_both_runs_are_generated_in_turn_and_speed_is_a_ratio_of_medians(generated):
    report = compare(A, B, None, DEFAULTS, repeats=3).report
    assert generated == [A, B] * 3
    assert report["a"]["denoise"] == [4, 8, 12] and report["speedup_denoise"] == 4
    assert report["speedup_range"] == [2, 6] and report["baseline_jitter"] == 3


def test_a_baseline_that_is_given_is_not_generated_again(generated):
    before = video(A, 6.0)
    pair = compare(A, B, None, DEFAULTS, repeats=2, baseline=before)
    assert generated == [B, B] and pair.a is before
    assert pair.report["a"]["denoise"] == [6] and pair.report["b"]["denoise"] == [2, 2]
    assert pair.report["speedup_range"] == [3, 3]


def test_callbacks_see_every_step_and_every_video_and_may_add_a_stage(generated):
    steps, videos = [], []

    def on_video(pane, video):
        videos.append(pane)
        video.seconds["encode"] = 0.5

    report = compare(A, B, None, DEFAULTS, on_step=lambda *args: steps.append(args[:2]), on_video=on_video).report
    assert steps == [("warm-up", 1), ("a", 4), ("b", 10)] and videos == ["a", "b"]
    assert report["a"]["encode"] == [0.5] and report["speedup_total"] == pytest.approx(4.5 / 2.5)


def test_the_report_has_the_race_of_the_last_videos(generated):
    pair = compare(A, B, None, DEFAULTS, repeats=2)
    assert pair.report["race"]["a"]["total"] == 8 and pair.report["race"]["b"]["times"] == [2]
    assert pair.a.race.sheet == b"" and "sheet" not in pair.report["race"]["a"]


def test_a_baseline_that_was_generated_before_keeps_its_race_or_has_none(generated):
    before = video(A, 6.0)
    assert compare(A, B, None, DEFAULTS, baseline=before).report["race"]["a"] is None
    before.race = Race(b"", [1], [6.0], 6.0, 8, 16, 16)
    assert compare(A, B, None, DEFAULTS, baseline=before).report["race"]["a"]["total"] == 6


def test_runs_that_drew_other_noise_are_reported(generated, monkeypatch):
    """A stochastic scheduler on other numbers of steps: a part of the difference is not the method's."""
    states, drew = iter([b"a", b"a", b"a", b"b"]), module.generate
    monkeypatch.setattr(module, "generate", lambda *given: replace(drew(*given), noise_state=next(states)))
    same, different = (compare(A, B, None, DEFAULTS).report["trace"]["summary"]["messages"] for _ in range(2))
    assert not same and len(different) == 1 and "did not draw the same" in different[0]
