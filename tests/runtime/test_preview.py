"""Previews of a denoising video, and the race that is made from them."""

import base64
import io

import numpy as np
import pytest
import torch
from PIL import Image

from accel.core.trace import Trace
from accel.runtime.generate import generate
from accel.runtime.models import ModelDefaults
from accel.runtime.preview import MAX_PREVIEWS, RaceRecorder, preview_image, preview_steps
from accel.runtime.run import build_run

DEFAULTS = ModelDefaults(height=16, width=32, frames=5, steps=3, text_length=8)


def picture(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


@pytest.mark.parametrize("steps", [1, 6, 64, 65, 100, 1000])
def test_every_step_has_a_preview_or_as_many_as_are_allowed_and_the_last_always_has_one(steps):
    wanted = preview_steps(steps)
    assert len(wanted) == min(steps, MAX_PREVIEWS) and max(wanted) == steps and min(wanted) >= 1


def test_a_race_has_one_preview_for_each_step_and_its_last_time_is_the_denoising_time(tiny_wan):
    run = build_run(DEFAULTS, model="m", prompt="a red star")
    recorder = RaceRecorder(run.steps)
    video = generate(run, tiny_wan, DEFAULTS, recorder)
    race = recorder.finish(tiny_wan, video.seconds["denoise"])
    assert race.steps == [1, 2, 3] and race.times == sorted(race.times)
    assert race.times[-1] == pytest.approx(video.seconds["denoise"], abs=0.01) == race.total
    assert (race.width, race.height) == (32, 16) and picture(race.sheet).size == (8 * 32, 16)
    assert race.to_json().keys() == {"steps", "times", "total", "columns", "width", "height", "frames"}


def test_recording_leaves_the_video_as_it_is(tiny_wan):
    run = build_run(DEFAULTS, model="m", prompt="a red star")
    plain = generate(run, tiny_wan, DEFAULTS)
    recorded = generate(run, tiny_wan, DEFAULTS, RaceRecorder(run.steps))
    assert torch.equal(plain.latents, recorded.latents)


def test_time_spent_in_the_callback_is_not_counted(pipe, monkeypatch):
    clock = iter([10.0, 17.0, 18.0, 25.0])  # a step begins its callback, and ends it seven seconds later
    monkeypatch.setattr("accel.runtime.preview.synchronized_time", lambda device: next(clock))
    seen, trace = [], Trace(started=9.0)
    recorder = RaceRecorder(2, lambda done, *_: seen.append(done))
    for done in (1, 2):
        recorder(done, trace, torch.zeros(1, pipe.vae.config.z_dim, 2, 2, 2))
    assert seen == [1, 2] and recorder.finish(pipe, 2.0).times == [1.0, 2.0]


def test_wide_previews_are_made_smaller_and_fill_rows_of_eight(pipe):
    recorder, scale = RaceRecorder(9), pipe.vae_scale_factor_spatial
    for done in range(1, 10):
        recorder(done, Trace(), torch.zeros(1, pipe.vae.config.z_dim, 1, 16, 256 // scale))
    race = recorder.finish(pipe, 1.0)
    assert race.width == 128 and race.height == 16 * scale // 2
    assert picture(race.sheet).size == (8 * 128, 2 * race.height)


def test_a_run_without_a_step_has_no_race(pipe):
    assert RaceRecorder(5).finish(pipe, 1.0) is None


def test_a_preview_is_a_png_of_the_first_frame(pipe):
    uri = preview_image(pipe, torch.zeros(1, pipe.vae.config.z_dim, 2, 2, 4))
    shown = np.asarray(picture(base64.b64decode(uri.removeprefix("data:image/png;base64,"))))
    assert shown.shape == (2 * pipe.vae_scale_factor_spatial, 4 * pipe.vae_scale_factor_spatial, 3)
