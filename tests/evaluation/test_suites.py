"""Suites as data: every setting can be built, and every pair is of settings of its suite."""

import pytest

from accel.evaluation.suites import FRONT, OVERVIEW, SUITES, Setting, check_suite
from accel.runtime.models import ModelDefaults
from accel.runtime.presets import build_methods
from accel.runtime.run import build_run


@pytest.mark.parametrize("suite", SUITES)
def test_every_setting_of_a_suite_can_be_built_and_the_first_is_the_baseline(suite):
    settings = [setting.settings() for setting in SUITES[suite].settings.values()]
    steps = 48 if suite.startswith("gpd") else None
    assert settings[0] == {"methods": {}, "steps": steps, "guidance": None, "solver": "default", "shift": None}
    for setting in settings:
        build_methods(setting["methods"])
        build_run(ModelDefaults(), **{**setting, "model": "-", "prompt": "-", "methods": {}})


@pytest.mark.parametrize("suite", SUITES)
def test_pairs_are_of_settings_of_the_suite(suite):
    assert {name for pair in SUITES[suite].pairs for name in pair} <= SUITES[suite].settings.keys()


def test_every_preset_of_the_overview_is_in_the_front():
    assert set(OVERVIEW.values()) <= SUITES[FRONT].settings.keys()


def test_an_unknown_suite_lists_the_known_ones():
    with pytest.raises(ValueError, match="unknown suite 'moon'; there are front, peers, paper, base"):
        check_suite("moon")


def test_a_setting_changes_single_parameters_of_its_preset():
    parameters = Setting("asymrnr", overrides={"asymrnr": {"budget": 0.9}}).settings()["methods"]["asymrnr"]
    assert parameters["budget"] == 0.9 and len(parameters) > 1


def test_a_setting_keeps_the_solver_and_shift_of_its_preset_unless_it_names_others(tmp_path):
    (file := tmp_path / "own.yaml").write_text("solver: dpm++2m\nshift: 2\nsteps: 9\n")
    settings = lambda **more: Setting(str(file), **more).settings()
    assert settings() == {"methods": {}, "steps": 9, "guidance": None, "solver": "dpm++2m", "shift": 2}
    assert settings(solver="euler", shift=5.0) == {**settings(), "solver": "euler", "shift": 5.0}


def test_a_setting_is_available_if_its_students_and_predictors_exist(students, tmp_path):
    setting = lambda folder: Setting("gpd", overrides={"gpd": {"student": str(folder)}})
    here, elsewhere = str(tmp_path), str(tmp_path / "none")
    assert setting(tmp_path / "gpd-N6").is_available(here) and not setting(tmp_path / "none").is_available(here)
    assert Setting("fastercache").is_available(elsewhere)
    for preset in ("gpd", "disca"):
        assert Setting(preset).is_available(here) and not Setting(preset).is_available(elsewhere)
