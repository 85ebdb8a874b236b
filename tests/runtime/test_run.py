"""Runs: defaults, what methods require, and what is said about bad input."""

import pytest

from accel.runtime.models import TINY, ModelDefaults
from accel.runtime.run import build_run, check_size_from_files

DEFAULTS = ModelDefaults(height=64, width=64, frames=17, steps=50, guidance=4.0)


@pytest.mark.parametrize(
    "settings, sentence",
    [
        ({"prompt": "  "}, "the prompt is empty"),
        ({"prompt": "a" * 5000}, "the prompt has 5000 characters, at most 2000 are allowed"),
        ({"seed": 1.5}, "seed = 1.5 is not allowed: a whole number from 0 to 9223372036854775807"),
        ({"seed": -1}, "seed = -1 is not allowed"),
        ({"steps": 0}, "steps = 0 is not allowed: a whole number from 1 to 1000"),
        ({"steps": 10_000}, "steps = 10000 is not allowed: a whole number from 1 to 1000"),
        ({"guidance": -2.0}, "guidance = -2.0 is not allowed: a number from 0 to 30"),
        ({"methods": {"fastercache": {"attention_interval": 99}}}, "attention_interval = 99 .* from 2 to 6"),
        ({"methods": {"gpd": {}}, "steps": 20}, "with gpd, which needs steps = 6; set gpd.steps instead"),
        ({"methods": {"gpd": {}, "meanflow": {}}}, "gpd and meanflow do not go together: each replaces the model"),
        ({"methods": {"disca": {"full_steps": "1 2 5"}}}, "disca.full_steps: "),
        ({"methods": {"asymrnr": {"budget": 0.755}}}, "a number from 0.2 to 1 in steps of 0.01"),
        ({"methods": {"asymrnr": {"schedule": "fixed", "rates": {"a": [[0.99, 0.1]]}}}}, "asymrnr.rates.a.0.0 = 0.99"),
        (
            {"methods": {"gpd": {}}, "guidance": 4.0},
            "guidance = 4.0 is not possible with gpd, which needs guidance = 1",
        ),
        ({"methods": {"gpd": {"steps": 7}}}, "gpd.steps = 7 is not allowed: one of 0, 6, 8, 12, 16, 24, 48"),
    ],
)
def test_bad_input_gets_one_sentence(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        build_run(DEFAULTS, **{"model": "m", "prompt": "a red star", **settings})


def test_what_a_method_requires_replaces_the_models_defaults():
    run = build_run(DEFAULTS, model="m", prompt="a", methods={"fastercache": {}, "gpd": {"steps": 12}})
    assert (run.steps, run.guidance) == (12, 1.0)


def test_missing_settings_are_the_models_defaults():
    run = build_run(DEFAULTS, model="m", prompt="a red star", steps=None)
    assert (run.height, run.frames, run.steps, run.guidance) == (64, 17, 50, 4.0)


def test_sizes_that_a_local_model_cannot_make_are_refused_from_its_files():
    run = lambda **size: build_run(DEFAULTS, model=TINY, prompt="a", **size)
    check_size_from_files(run())
    with pytest.raises(ValueError, match="width = 70 is not possible: it must be a multiple of 8"):
        check_size_from_files(run(width=70))
    with pytest.raises(ValueError, match="frames = 18 is not possible: it must be 1 more than a multiple of 2"):
        check_size_from_files(run(frames=18))
