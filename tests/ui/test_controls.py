"""Widgets are made from the methods' fields, and presets and values pass through them."""

import gradio as gr
import pytest

from accel.methods import METHODS
from accel.runtime.models import TINY
from accel.runtime.paths import ROOT
from accel.runtime.presets import load_preset
from ui.controls import MethodControls, nearest_available, parameter_widgets, parse_values


@pytest.mark.parametrize("name", METHODS)
def test_every_field_has_a_widget_with_its_range_and_help(name):
    with gr.Blocks():
        widgets = parameter_widgets(METHODS[name]())
    assert list(widgets) == list(METHODS[name].parameters())
    for field, schema in METHODS[name].parameters().items():
        assert widgets[field].info == schema["description"] and widgets[field].value == schema["default"]
        if "maximum" in schema:
            assert (widgets[field].minimum, widgets[field].maximum) == (schema["minimum"], schema["maximum"])


def test_slider_values_become_settings_that_the_method_takes():
    method = METHODS["fastercache"]
    values = {name: getattr(method(), name) for name in method.parameters()} | {"attention_interval": 3.0}
    assert method(**parse_values(method, values)).attention_interval == 3


def test_the_values_of_all_widgets_become_the_settings_of_the_methods_that_are_switched_on():
    with gr.Blocks():
        controls = MethodControls(TINY, load_preset("disca"))
    settings = controls.settings([component.value for component in controls.components])
    assert list(settings) == ["meanflow", "disca"]
    for name, method in zip(settings, load_preset("disca"), strict=True):
        assert METHODS[name](**settings[name]) == method


def test_only_students_that_exist_are_offered(pipe, students, tmp_path):
    (tmp_path / "gpd-N8" / "gpd.json").unlink()
    with gr.Blocks():
        widgets = parameter_widgets(METHODS["gpd"](), METHODS["gpd"].available_values(tmp_path))
    assert [value for _, value in widgets["steps"].choices] == [0, 6, 12, 16, 24, 48]
    assert METHODS["gpd"].available_values(tmp_path / "none") == {"steps": []}


def test_a_slider_has_the_range_that_the_student_was_trained_for():
    assert METHODS["meanflow"].available_values(ROOT / TINY)["guidance"] == (2.0, 5.0)
    with gr.Blocks():
        widgets = parameter_widgets(METHODS["meanflow"](), {"guidance": (2.0, 3.5)})
    assert (widgets["guidance"].minimum, widgets["guidance"].maximum, widgets["guidance"].value) == (2.0, 3.5, 3.5)


def test_a_preset_names_what_a_model_lacks(tmp_path):
    with gr.Blocks():
        controls = MethodControls(str(tmp_path), load_preset("fastercache"))
    values, missing = controls.preset_values(load_preset("turbo"))
    assert missing == [f"{METHODS['meanflow'].title} is off", "DisCa's predictor is reuse instead of residual"]
    assert not values[controls.switches["meanflow"]] and values[controls.parameters["disca"]["predictor"]] == "reuse"
    assert not controls.switches["meanflow"].interactive and controls.switches["disca"].interactive
    assert controls.preset_values(load_preset("fastercache"))[1] == []


def test_a_parameter_falls_back_to_the_nearest_available_value():
    assert nearest_available(7, [0, 6, 48]) == 6
    assert nearest_available("residual", ["reuse", "taylor-1"]) == "reuse"
    assert nearest_available(9.0, (2.0, 5.0)) == 5.0 and nearest_available(3, None) == 3
