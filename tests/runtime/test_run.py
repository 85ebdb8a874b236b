"""Runs: defaults, what methods require, and what is said about bad input."""

import json
import random

import pytest

from accel.errors import AccelError
from accel.methods import METHODS
from accel.runtime.models import TINY, ModelDefaults
from accel.runtime.run import Run, build_run, check_size_from_files, parse_run

DEFAULTS = ModelDefaults(height=64, width=64, frames=17, steps=50, guidance=4.0)


@pytest.mark.parametrize(
    "settings, sentence",
    [
        ({"prompt": "  "}, "the prompt is empty"),
        ({"prompt": "a" * 5000}, "the prompt has 5000 characters, at most 2000 are allowed"),
        ({"seed": 1.5}, "seed = 1.5 is not allowed: a whole number from 0 to 9223372036854775807"),
        ({"seed": -1}, "seed = -1 is not allowed"),
        ({"seed": 2**63}, "seed = 9223372036854775808 is not allowed: a whole number from 0 to 9223372036854775807"),
        ({"seed": 10**5000}, "seed = a number of thousands of digits is not allowed"),
        ({"seed": float("inf")}, "seed = inf is not allowed: a whole number"),
        ({"seed": True}, "seed = True is not allowed: a whole number"),
        ({"seed": "7"}, "seed = '7' is not allowed: a whole number"),
        ({"guidance": float("nan")}, "guidance = nan is not allowed: a number from 0 to 30"),
        ({"guidance": "inf"}, "guidance = 'inf' is not allowed: a number from 0 to 30"),
        ({"steps": []}, r"steps = \[\] is not allowed: a whole number from 1 to 1000"),
        ({"steps": {}}, "steps = {} is not allowed: a whole number from 1 to 1000"),
        ({"prompt": 5}, "prompt = 5 is not allowed: a text"),
        ({"prompt": "a \ud800 star"}, "prompt = 'a .* is not allowed: a text"),
        ({"prompt": None}, "prompt is missing: give a text"),
        ({"solver": "magic"}, r"solver = 'magic' is not allowed: one of default, unipc, euler, dpm\+\+2m, dpm\+\+2s"),
        ({"shift": 0}, "shift = 0 is not allowed: a number from 0.1 to 20"),
        ({"colour": 1}, "unknown setting colour; known are model, prompt"),
        ({"methods": "fastercache"}, "methods = 'fastercache' is not allowed: write {method: {parameter: value}}"),
        ({"methods": {"fastercache": 3}}, "fastercache = 3 is not allowed: write {parameter: value}"),
        ({"methods": {"fastercache": {"attention_interval": True}}}, "attention_interval = True is not allowed"),
        ({"methods": {"fastercache": {"attention": 1}}}, "fastercache.attention = 1 is not allowed: true or false"),
        ({"methods": {"fastercache": {"gain_low": float("nan")}}}, "gain_low = nan is not allowed"),
        ({"steps": 0}, "steps = 0 is not allowed: a whole number from 1 to 1000"),
        ({"steps": 10_000}, "steps = 10000 is not allowed: a whole number from 1 to 1000"),
        ({"guidance": -2.0}, "guidance = -2.0 is not allowed: a number from 0 to 30"),
        ({"methods": {"fastercache": {"attention_interval": 99}}}, "attention_interval = 99 .* from 2 to 6"),
        ({"methods": {"gpd": {}}, "steps": 20}, "with gpd, which needs steps = 6; set gpd.steps instead"),
        (
            {"methods": {"gpd": {}, "meanflow": {}}},
            "gpd and meanflow do not go together: each brings its own noise levels",
        ),
        (
            {"methods": {"stepcache": {}, "disca": {"predictor": "reuse"}}},
            "StepCache and DisCa do not go together: each stands in for all blocks in some steps",
        ),
        (
            {"methods": {"fastercache": {"reuse": "stack"}, "stepcache": {}}},
            "FasterCache and StepCache do not go together: each stands in for all blocks",
        ),
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


def test_whole_floats_are_integers_and_every_allowed_seed_is_exact():
    run = build_run(DEFAULTS, model="m", prompt="a", steps=20.0, methods={"fastercache": {"attention_interval": 3.0}})
    assert repr(run.steps) == "20" and repr(run.methods["fastercache"]["attention_interval"]) == "3"
    for seed in (2**53 + 1, 2**63 - 1):
        assert build_run(DEFAULTS, model="m", prompt="a", seed=seed).seed == seed


def test_an_emptied_box_is_refused_and_a_missing_setting_is_the_models_own():
    given = {"model": "m", "prompt": "a red star"}
    assert parse_run(DEFAULTS, given).steps == 50
    assert parse_run(DEFAULTS, {**given, "shift": None}).shift is None
    with pytest.raises(AccelError, match="^steps is empty: give a whole number from 1 to 1000$"):
        parse_run(DEFAULTS, {**given, "steps": None})
    with pytest.raises(AccelError, match=r"the settings \['a'\] are not understood"):
        parse_run(DEFAULTS, ["a"])


def test_runs_from_before_there_were_solvers_are_read():
    run = build_run(DEFAULTS, model="m", prompt="a red star").model_dump()
    del run["solver"], run["shift"]
    assert Run(**run).solver == "default"


def hostile(rng: random.Random):
    """A value as JSON or a widget may bring it."""
    values = [None, True, False, 0, 1, -1, 50, 2.0, 2.5, 1e308, float("inf"), float("-inf"), float("nan"), 2**63, 2**64]
    values += [
        10**5000,
        -(2**70),
        "",
        "3",
        "inf",
        "nan",
        "é" * 300,
        "\ud800",
        "\x00",
        "a\nb",
        "<b>x</b>",
        [],
        [[]],
        [1, 2],
    ]
    values += [{}, {"a": {}}, {"\ud800": 1}, [None] * 99, {"": None}, "../../etc/passwd", b"bytes"]
    return rng.choice(values)


def hostile_settings(rng: random.Random) -> dict:
    keys = [*Run.model_fields, "defaults", "colour", "\ud800", "a b\nc", ""]
    settings = {
        "model": "m",
        "prompt": "a red star",
        **{rng.choice(keys): hostile(rng) for _ in range(rng.choice([1, 1, 3]))},
    }
    if rng.random() < 0.5:
        name = rng.choice([*METHODS, "magic", "\ud800"])
        fields = [*METHODS[name].model_fields] if name in METHODS else []
        settings["methods"] = {name: {rng.choice([*fields, "speed", "\ud800"]): hostile(rng)}}
    return settings


@pytest.mark.parametrize("seed", range(20))
def test_hostile_values_give_a_checked_run_or_one_clear_sentence(seed):
    rng = random.Random(seed)
    for _ in range(50):
        try:
            run = parse_run(DEFAULTS, hostile_settings(rng))
        except AccelError as error:
            text = str(error)
            assert 10 < len(text) < 400 and "\n" not in text and "Error" not in text and "pydantic" not in text
            text.encode()
        else:
            assert json.loads(run.model_dump_json())["seed"] == run.seed
            assert type(run.steps) is int and run.prompt.encode() and build_run(DEFAULTS, **run.model_dump()) == run
