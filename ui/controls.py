"""The methods' parameters as Gradio widgets: a switch per method and a widget per field, made from the field."""

from __future__ import annotations

from typing import Any

import gradio as gr

from accel.methods import METHODS, Method
from accel.methods.base import Choices
from accel.runtime.models import resolve
from accel.runtime.presets import Preset

AvailableValues = dict[str, Choices]  # values of some parameters, where the model at hand does not have all


class MethodControls:
    """The switches and parameter widgets of all methods for one model; create it inside a `gr.Blocks`."""

    def __init__(self, model: str, preset: Preset):
        """Create the widgets with the values of a preset."""
        self.available_values = {name: method.available_values(resolve(model)) for name, method in METHODS.items()}
        self.switches: dict[str, gr.Checkbox] = {}
        self.parameters: dict[str, dict[str, gr.components.Component]] = {}
        active = _methods_by_name(preset)
        for name, method in METHODS.items():
            gr.Markdown(f"### {method.title} · [{method.paper}](https://arxiv.org/abs/{method.paper[6:]})")
            usable = self._is_usable(name)
            self.switches[name] = gr.Checkbox(
                name in active, label=f"use {method.title}", elem_id=f"use-{name}", interactive=usable,
                info=None if usable else "No weights have been trained for this model yet: see the README.",
            )  # fmt: skip
            with gr.Row():
                self.parameters[name] = parameter_widgets(active.get(name) or method(), self.available_values[name])

    @property
    def components(self) -> list[gr.components.Component]:
        """All switches, then all parameters; `settings` takes their values in this order."""
        return [*self.switches.values(), *(w for widgets in self.parameters.values() for w in widgets.values())]

    def settings(self, values: list[Any]) -> dict[str, dict[str, Any]]:
        """{method: {parameter: value}} of the methods that are switched on, from the values of `components`."""
        switched_on, rest, settings = dict(zip(METHODS, values)), iter(values[len(METHODS) :]), {}
        for name, method in METHODS.items():
            parameters = {parameter: next(rest) for parameter in method.parameters()}
            if switched_on[name]:
                settings[name] = parse_values(method, parameters)
        return settings

    def preset_values(self, preset: Preset) -> tuple[dict[gr.components.Component, Any], list[str]]:
        """The value of every component for a preset, and what of the preset this model lacks, in words."""
        values, missing, active = {}, [], _methods_by_name(preset)
        for name, method in METHODS.items():
            wanted = active.get(name)
            usable = self._is_usable(name)
            values[self.switches[name]] = wanted is not None and usable
            if wanted and not usable:
                missing.append(f"{method.title} is off")
            for parameter, widget in self.parameters[name].items():
                value = getattr(wanted or method(), parameter)
                nearest = nearest_available(value, self.available_values[name].get(parameter))
                values[widget] = nearest
                if wanted and usable and nearest != value:
                    missing.append(f"{method.title}'s {_words(parameter)} is {nearest} instead of {value}")
        return values, missing

    def _is_usable(self, name: str) -> bool:
        """Whether the model has what a method needs: an empty list of values means that nothing was trained."""
        return all(self.available_values[name].values())


def parameter_widgets(method: Method, available: AvailableValues | None = None) -> dict[str, gr.components.Component]:
    """{parameter: widget} of a method; label, help, range and value all come from its fields."""
    widgets, available = {}, available or {}
    for name, schema in method.parameters().items():
        common = {
            "label": _words(name), "info": schema.get("description", ""), "min_width": 220,
            "value": nearest_available(getattr(method, name), available.get(name)),
            "elem_id": f"{method.title.lower()}-{name}",
        }  # fmt: skip
        if schema["type"] == "boolean":
            widgets[name] = gr.Checkbox(**common, elem_classes="flag")  # Gradio's row makes it too narrow for its text
        elif "enum" in schema:
            widgets[name] = gr.Radio(available.get(name) or schema["enum"], **common)
        else:
            step = schema.get("multipleOf", 1 if schema["type"] == "integer" else 0.01)
            low, high = available.get(name) or (schema["minimum"], schema["maximum"])
            widgets[name] = gr.Slider(low, high, step=step, **common)
    return widgets


def nearest_available(value: Any, choices: Choices | None) -> Any:
    """A parameter's value, or the nearest value that the model at hand offers."""
    if isinstance(choices, tuple):
        return min(max(value, choices[0]), choices[1])
    if not choices or value in choices:
        return value
    is_number = isinstance(value, int | float)
    return min(choices, key=lambda other: abs(other - value)) if is_number else choices[0]


def parse_values(method: type[Method], values: dict[str, Any]) -> dict[str, Any]:
    """Widget values as the method takes them: a slider gives a float where the field is an integer."""
    types = {name: schema["type"] for name, schema in method.parameters().items()}
    return {name: int(v) if types[name] == "integer" and float(v).is_integer() else v for name, v in values.items()}


def _methods_by_name(preset: Preset) -> dict[str, Method]:
    return dict(zip(preset.methods, preset))


def _words(name: str) -> str:
    return name.replace("_", " ")
