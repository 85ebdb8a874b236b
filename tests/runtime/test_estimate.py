"""What is said of a run's time before it starts: the share of work is the one that the trace counts afterwards."""

import pytest

import accel
from accel.families.wan import Wan
from accel.methods.base import RunSpec
from accel.runtime import estimate as module
from accel.runtime.estimate import duration, estimate
from accel.runtime.models import ModelDefaults
from accel.runtime.presets import build_methods
from accel.runtime.run import build_run

DEFAULTS = ModelDefaults(height=64, width=64, frames=5, steps=20, guidance=4.0, text_length=6)
GUIDED, UNGUIDED = 0.2, 0.1  # seconds of a step


def run_of(**settings):
    return build_run(DEFAULTS, model="m", prompt="a red star", **settings)


@pytest.fixture(autouse=True)
def defaults(monkeypatch):
    monkeypatch.setattr(module, "model_defaults", lambda pipe, model: DEFAULTS)


@pytest.mark.parametrize("guidance", [4.0, 1.0])
@pytest.mark.parametrize(
    "methods",
    [
        {"fastercache": {}},
        {"fastercache": {"attention_interval": 4, "guidance": False}},
        {"disca": {"predictor": "taylor-1", "num_full_steps": 6}},
        {"disca": {"predictor": "reuse", "num_full_steps": 20}},
    ],
    ids=str,
)
def test_the_expected_share_of_work_is_the_share_that_a_run_computes(methods, guidance, pipe, sample):
    with accel.apply(pipe, build_methods(methods)) as trace:
        sample(pipe, steps=20, guidance=guidance)
    (share,) = module.expected_shares(run_of(methods=methods, guidance=guidance), pipe)
    assert share == pytest.approx(trace.summary()["flops_ratio"], abs=0.002)


def test_the_stock_pipeline_takes_its_steps_and_a_method_the_share_it_leaves(pipe):
    step_seconds = lambda run: GUIDED if run.guidance > 1 else UNGUIDED
    plain = estimate(run_of(), pipe, step_seconds)
    assert (plain.seconds, plain.at_most, plain.memory_bytes) == (pytest.approx(4.0), False, 0)
    assert plain.words == "about 4.0 s of denoising"
    faster = estimate(run_of(methods={"fastercache": {}}), pipe, step_seconds)
    assert 1 < faster.seconds < 4 and not faster.at_most and "MiB cached" in faster.words


def test_a_share_that_depends_on_the_video_gives_an_upper_bound(pipe):
    known = estimate(run_of(methods={"fastercache": {}}), pipe, lambda run: GUIDED)
    both = estimate(run_of(methods={"asymrnr": {}, "fastercache": {}}), pipe, lambda run: GUIDED)
    assert both.at_most and both.seconds == known.seconds and both.words.startswith("at most about ")


def test_a_share_that_was_measured_with_another_prompt_is_taken_where_none_is_known(pipe):
    work = lambda run: 0.4
    found = estimate(run_of(methods={"stepcache": {}}), pipe, lambda run: GUIDED, work)
    assert not found.at_most and found.seconds == pytest.approx(0.4 * 20 * GUIDED)
    known = estimate(run_of(methods={"fastercache": {}}), pipe, lambda run: GUIDED)
    assert estimate(run_of(methods={"fastercache": {}}), pipe, lambda run: GUIDED, work) == known


def test_an_unguided_step_that_was_never_measured_is_half_a_guided_one(pipe):
    measured = lambda run: GUIDED if run.guidance > 1 else None
    assert estimate(run_of(guidance=1.0), pipe, measured).seconds == pytest.approx(2.0)


def test_where_guidance_is_an_input_an_unguided_step_takes_as_long_as_a_guided_one(pipe, monkeypatch):
    monkeypatch.setattr(Wan, "embeds_guidance", True)
    measured = lambda run: GUIDED if run.guidance > 1 else None
    assert estimate(run_of(guidance=1.0), pipe, measured).seconds == pytest.approx(4.0)


def test_without_a_measured_step_there_is_no_time(pipe):
    assert estimate(run_of(), pipe, lambda run: None).words == "time not known before the first run"


def test_a_student_computes_its_steps_in_full():
    (student,) = build_methods({"gpd": {}})
    assert student.expected_work(RunSpec(None, None, None, None, 6, False, 2), {"denoiser": 10}) == 1


@pytest.mark.parametrize("seconds, words", [(2.34, "2.3 s"), (9.96, "10 s"), (99.6, "2 min"), (7200, "2.0 h")])
def test_durations_are_short(seconds, words):
    assert duration(seconds) == words
