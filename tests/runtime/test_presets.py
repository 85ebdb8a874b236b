"""Presets and runs: what is accepted, and how what is not is told."""

import pytest
import yaml

from accel.runtime.models import ModelDefaults, check_files, load_pipeline
from accel.runtime.presets import Preset, build_methods, load_preset, preset_names
from accel.runtime.run import build_run

HOME = ModelDefaults(height=64, width=64, frames=17, steps=50, guidance=4.0)


@pytest.mark.parametrize("name", preset_names())
def test_presets_round_trip(name, tmp_path):
    preset = load_preset(name)
    (tmp_path / "again.yaml").write_text(yaml.safe_dump(preset.model_dump()))
    assert load_preset(tmp_path / "again.yaml") == preset
    full = {m: type(built)(**built.model_dump()) for m, built in zip(preset.methods, preset)}
    assert list(full.values()) == list(preset)


def test_unknown_preset_lists_the_known_ones():
    with pytest.raises(ValueError, match="no preset 'fast'; there are .*fastercache"):
        load_preset("fast")


@pytest.mark.parametrize("text", ["- a list", "about: [", "colour: red", "methods: {magic: {}}", "steps: 0"])
def test_a_bad_file_is_refused_in_one_line(text, tmp_path):
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(ValueError) as error:
        load_preset(tmp_path / "bad.yaml")
    assert "\n" not in str(error.value)


def test_unknown_method_lists_the_known_ones():
    with pytest.raises(ValueError, match="unknown method 'magic'; known are fastercache"):
        build_methods({"magic": {}})


def test_preset_is_an_iterable_of_methods():
    assert [m.attention_interval for m in Preset(methods={"fastercache": {"attention_interval": 3}})] == [3]


@pytest.mark.parametrize(
    "asked, sentence",
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
        ({"methods": {"gpd": {}, "meanflow": {}}}, "gpd and meanflow do not go together: each replaces the model by a student"),
        ({"methods": {"disca": {"full_steps": "1 2 5"}}}, "disca.full_steps: "),
        ({"methods": {"asymrnr": {"budget": 0.755}}}, "a number from 0.2 to 1 in steps of 0.01"),
        ({"methods": {"asymrnr": {"schedule": "fixed", "rates": {"a": [[0.99, 0.1]]}}}}, "asymrnr.rates.a.0.0 = 0.99"),
        ({"methods": {"gpd": {}}, "guidance": 4.0}, "guidance = 4.0 is not possible with gpd, which needs guidance = 1"),
        ({"methods": {"gpd": {"steps": 7}}}, "gpd.steps = 7 is not allowed: one of 0, 6, 8, 12, 16, 24, 48"),
    ],
)
def test_bad_input_gets_one_sentence(asked, sentence):
    with pytest.raises(ValueError, match=sentence):
        build_run(HOME, **{"model": "m", "prompt": "a red star", **asked})


def test_what_a_method_demands_goes_before_the_models_own():
    run = build_run(HOME, model="m", prompt="a", methods={"fastercache": {}, "gpd": {"steps": 12}})
    assert (run.steps, run.guidance) == (12, 1.0)


def test_what_is_not_given_is_the_models_own():
    run = build_run(HOME, model="m", prompt="a red star", steps=None)
    assert (run.height, run.frames, run.steps, run.guidance) == (64, 17, 50, 4.0)


def test_missing_model_says_what_there_is():
    with pytest.raises(ValueError, match="no model folder 'models/none'; the shipped model is 'models/tiny-wan'"):
        load_pipeline("models/none")


def test_damaged_weights_are_named_with_the_remedy(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "m")
    file = next((tmp_path / "m" / "vae").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(ValueError, match=r"vae.*safetensors is damaged .* restore it with"):
        check_files(tmp_path / "m")
    file.unlink()
    with pytest.raises(ValueError, match="vae holds no .safetensors file"):
        check_files(tmp_path / "m")
