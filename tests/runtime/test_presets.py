"""Presets: what is accepted, and what is said about the rest."""

import pytest
import yaml

from accel.runtime.presets import Preset, build_methods, load_preset, preset_names, with_parameter


@pytest.mark.parametrize("name", preset_names())
def test_a_preset_survives_a_round_trip_through_its_file(name, tmp_path):
    preset = load_preset(name)
    (tmp_path / "again.yaml").write_text(yaml.safe_dump(preset.model_dump()))
    assert load_preset(tmp_path / "again.yaml") == preset
    assert [type(method)(**method.model_dump()) for method in preset] == list(preset)


def test_an_unknown_preset_lists_the_known_ones():
    with pytest.raises(ValueError, match="no preset 'fast'; there are .*fastercache"):
        load_preset("fast")


@pytest.mark.parametrize("text", ["- a list", "about: [", "colour: red", "methods: {magic: {}}", "steps: 0"])
def test_a_bad_file_is_refused_in_one_line(text, tmp_path):
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(ValueError) as error:
        load_preset(tmp_path / "bad.yaml")
    assert "\n" not in str(error.value)


def test_an_unknown_method_lists_the_known_ones():
    with pytest.raises(ValueError, match="unknown method 'magic'; known are fastercache"):
        build_methods({"magic": {}})


def test_a_method_that_a_parameter_adds_stands_inside_of_those_that_need_its_calls():
    balanced = load_preset("balanced").methods
    changed = with_parameter(balanced, "fastercache", "attention_interval", 3)
    assert list(changed.items()) == [("fastercache", {"attention_interval": 3}), *balanced.items()]
    assert list(with_parameter(changed, "stepcache", "threshold", 0.1)) == ["fastercache", "stepcache", "fittedsolver"]
    assert list(with_parameter(balanced, "seacache", "threshold", 0.1)) == ["fittedsolver", "seacache"]
    assert list(with_parameter(balanced, "warp", "speed", 9)) == ["fittedsolver", "warp"]  # refused where it is built


def test_a_changed_parameter_leaves_the_preset_as_it_was():
    preset = load_preset("fastercache")
    assert (
        with_parameter(preset.methods, "fastercache", "attention_interval", 5)["fastercache"]["attention_interval"] == 5
    )
    assert preset.methods["fastercache"]["attention_interval"] == 2


def test_iterating_over_a_preset_gives_its_methods():
    assert [m.attention_interval for m in Preset(methods={"fastercache": {"attention_interval": 3}})] == [3]
