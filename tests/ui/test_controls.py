"""Widgets are made from the methods' fields, and presets and values pass through them."""

import gradio as gr
import pytest

from accel.methods import METHODS
from accel.runtime.models import TINY
from accel.runtime.paths import ROOT
from accel.runtime.presets import load_preset
from ui.controls import Change, MethodControls, available_values, changes_from, nearest_available, parse_values, widget


@pytest.mark.parametrize("name", METHODS)
def test_every_field_has_a_widget_with_its_range_and_help(name):
    with gr.Blocks():
        made = {field: widget(field, METHODS[name](), {}) for field in METHODS[name].parameters()}
    for field, schema in METHODS[name].parameters().items():
        assert made[field].info == schema["description"] and made[field].value == schema["default"]
        if "maximum" in schema and "enum" not in schema:
            assert (made[field].minimum, made[field].maximum) == (schema["minimum"], schema["maximum"])


def test_a_number_that_was_typed_out_of_range_is_the_nearest_end_as_in_the_browser():
    with gr.Blocks():
        interval = widget("attention_interval", METHODS["fastercache"](), {})
    assert [interval.preprocess(typed) for typed in (9, 1, None, 3)] == [6, 2, 2, 3]
    assert interval.get_block_name() == "slider"


@pytest.mark.parametrize("name", METHODS)
def test_the_basic_parameters_exist_and_are_not_all(name):
    assert set(METHODS[name].basic) <= set(METHODS[name].parameters())


def test_only_the_parameters_of_active_methods_are_shown():
    with gr.Blocks():
        controls = MethodControls(TINY, load_preset("disca"))
    assert [name for name, group in controls.groups.items() if group.visible] == ["meanflow", "disca"]
    values = [name == "asymrnr" for name in METHODS]
    shown = controls.visibility(values)
    assert [name for name, group in controls.groups.items() if shown[group]["visible"]] == ["asymrnr"]


def test_a_peer_whose_package_is_missing_cannot_be_switched_on(monkeypatch):
    monkeypatch.setattr("accel.methods.cachedit.find_spec", lambda name: None)
    with gr.Blocks():
        controls = MethodControls(TINY, load_preset("fastercache"))
    updates, missing = controls.preset_values(load_preset("dbcache"), TINY)
    assert not controls.switches["dbcache"].interactive and controls.switches["seacache"].interactive
    assert controls.switches["dbcache"].info == "not installed" and not controls.switches["seacache"].info
    assert not updates[controls.switches["dbcache"]]["value"]
    assert missing == ["DBCache (cache-dit) is off, without its package"]


def test_slider_values_become_settings_that_the_method_takes():
    method = METHODS["fastercache"]
    values = {name: getattr(method(), name) for name in method.parameters()} | {"attention_interval": 3.0}
    assert method(**parse_values(method, values)).attention_interval == 3


@pytest.mark.parametrize("preset", ["disca", "combined", "asymrnr-official"])
def test_the_values_of_all_widgets_become_the_settings_of_the_methods_that_are_switched_on(preset):
    with gr.Blocks():
        controls = MethodControls(TINY, load_preset(preset))
    settings = controls.settings([component.value for component in controls.components])
    methods = dict(zip(load_preset(preset).methods, load_preset(preset)))
    assert {name: METHODS[name](**settings[name]) for name in settings} == methods
    assert changes_from(load_preset(preset), settings, TINY) == []


def test_a_parameter_that_differs_from_its_preset_is_named_and_marked():
    preset = load_preset("fastercache")
    with gr.Blocks():
        controls = MethodControls(TINY, preset)
    settings = controls.settings([component.value for component in controls.components])
    settings["fastercache"]["attention_interval"] = 5
    changes = changes_from(preset, settings, TINY)
    assert changes == [Change("fastercache", "attention_interval", 5, 2)]
    marked = [c for c, update in controls.marks(changes).items() if "changed" in update["elem_classes"]]
    assert marked == [controls.parameters["fastercache"]["attention_interval"]]


def test_only_students_that_exist_are_offered(pipe, students, tmp_path):
    (tmp_path / "gpd-N8" / "gpd.json").unlink()
    with gr.Blocks():
        made = widget("steps", METHODS["gpd"](), available_values("gpd", str(tmp_path)))
    assert [value for _, value in made.choices] == [0, 6, 12, 16, 24, 48]
    assert METHODS["gpd"].available_values(tmp_path / "none") == {"steps": []}


def test_with_a_preset_the_widgets_get_the_values_of_the_model(pipe, students, tmp_path):
    (tmp_path / "gpd-N8" / "gpd.json").unlink()
    with gr.Blocks():
        controls = MethodControls(TINY, load_preset("fastercache"))
    steps = controls.parameters["gpd"]["steps"]
    assert controls.preset_values(load_preset("gpd"), str(tmp_path))[0][steps]["choices"] == [0, 6, 12, 16, 24, 48]
    without = controls.preset_values(load_preset("gpd"), str(tmp_path / "none"))[0][steps]
    assert without["value"] in without["choices"]  # or every event of the page would be refused


def test_a_slider_has_the_range_that_the_student_was_trained_for():
    assert METHODS["meanflow"].available_values(ROOT / TINY)["guidance"] == (2.5, 6.25)
    with gr.Blocks():
        made = widget("guidance", METHODS["meanflow"](), {"guidance": (2.0, 3.5)})
    assert (made.minimum, made.maximum, made.value) == (2.0, 3.5, 3.5)


def test_a_preset_names_what_a_model_lacks(tmp_path):
    with gr.Blocks():
        controls = MethodControls(str(tmp_path), load_preset("fastercache"))
    updates, missing = controls.preset_values(load_preset("turbo"), str(tmp_path))
    assert missing == [
        f"{METHODS['meanflow'].title} is off, without its weights for this model",
        "DisCa's predictor is reuse instead of residual",
    ]
    assert not updates[controls.switches["meanflow"]]["value"]
    assert updates[controls.parameters["disca"]["predictor"]]["value"] == "reuse"
    assert not controls.switches["meanflow"].interactive and controls.switches["disca"].interactive
    assert controls.switches["meanflow"].info == "not trained"
    assert controls.preset_values(load_preset("fastercache"), str(tmp_path))[1] == []


def test_a_parameter_falls_back_to_the_nearest_available_value():
    assert nearest_available(7, [0, 6, 48]) == 6
    assert nearest_available("residual", ["reuse", "taylor-1"]) == "reuse"
