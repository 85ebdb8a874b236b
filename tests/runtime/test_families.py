"""Runs, estimates and previews of pipelines of other families: what the page and the command line do with them."""

import sys
from pathlib import Path

import pytest
import torch

from accel.errors import AccelError
from accel.families import family_of
from accel.runtime.estimate import estimate, step_flops
from accel.runtime.generate import generate, grid, preflight
from accel.runtime.models import model_defaults
from accel.runtime.preview import RaceRecorder
from accel.runtime.run import build_run, check_size

sys.path.append(str(Path(__file__).parents[1] / "families"))
from tiny import TINY, encoding  # noqa: E402


@pytest.fixture(params=["cogvideox", "skyreels_v2", "hunyuan_video", "ltx", "mochi", "kandinsky5"])
def tiny(request):
    """A tiny pipeline whose text encoder gives the same embeddings for every prompt."""
    return encoding(request.param)


def run_of(pipe, **settings):
    settings = {"prompt": "a cat", "height": 64, "width": 64, "frames": 25, "steps": 12, **settings}
    return build_run(model_defaults(pipe, "somebody/model"), model="somebody/model", **settings)


def test_a_run_gives_a_video_its_trace_and_previews(tiny):
    run, recorder = run_of(tiny, methods={"fastercache": {}}), RaceRecorder(12)
    video = generate(run, tiny, model_defaults(tiny, run.model), recorder)
    assert video.frames.shape[1:] == (64, 64, 3) and video.latents.ndim == 5
    assert tuple(-(-n // p) for n, p in zip(video.latents.shape[2:], family_of(tiny).patch(tiny.transformer))) == grid(
        tiny, run
    )
    assert video.trace.summary()["steps"] == 12 and video.trace.summary()["flops_ratio"] < 1
    assert recorder.finish(tiny, 1.0).steps == list(range(1, 13))


def test_a_run_is_estimated_before_it_starts(tiny):
    run = run_of(tiny, methods={"fastercache": {}})
    assert step_flops(run, tiny) > 0
    assert "MiB" in preflight(run, tiny)[0] and estimate(run, tiny, lambda _: 1.0).seconds > 0


def test_a_size_that_the_model_cannot_make_is_refused(tiny):
    with pytest.raises(AccelError, match="height = 68 is not possible: it must be a multiple of"):
        check_size(run_of(tiny, height=68), tiny)


def test_the_defaults_are_those_of_the_pipelines_call():
    pipe, _ = TINY["mochi"]()
    defaults = model_defaults(pipe, "somebody/model")
    assert (defaults.height, defaults.width, defaults.frames, defaults.text_length) == (480, 848, 19, 256)
    cogvideox, _ = TINY["cogvideox"]()
    config = cogvideox.transformer.config
    assert model_defaults(cogvideox, "somebody/model").frames == config.sample_frames


def test_a_pipeline_without_a_step_callback_is_for_accel_apply_alone():
    pipe, _ = TINY["hunyuan_video_15"]()
    with pytest.raises(AccelError, match="HunyuanVideo15Pipeline takes no callback_on_step_end: use accel.apply"):
        model_defaults(pipe, "somebody/model")


def test_a_rough_preview_shows_the_latents(tiny):
    if type(tiny.vae).__name__ == "AutoencoderKLWan":
        pytest.skip("its autoencoder decodes a frame on its own")
    from accel.runtime.preview import _first_frames

    latents = torch.zeros(1, 4, 2, 2, 2)
    latents[0, 0, 0, 0, 0] = 1
    (picture,) = _first_frames(tiny, latents)
    assert picture.shape == (16, 16, 3) and picture[0, 0].tolist() == [254, 0, 0] and picture[8:, 8:].max() == 0
