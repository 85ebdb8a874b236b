"""The methods' parameters as Gradio widgets: a switch per method and a widget per field, made from the field."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import gradio as gr

from accel.methods import METHODS, Method
from accel.methods.base import Choices
from accel.runtime.models import resolve
from accel.runtime.presets import Preset
from ui.slider import ClampedSlider

AvailableValues = dict[str, Choices]  # values of some parameters, where the model at hand does not have all
Update = dict[gr.blocks.Block, Any]
PACKAGE, WEIGHTS = "its package", "its weights for this model"  # what a method may lack
LACKING = {PACKAGE: "not installed", WEIGHTS: "not trained"}  # beside a switch


class Change(NamedTuple):
    """A parameter that differs from its preset."""

    method: str
    parameter: str
    value: Any
    preset_value: Any


class MethodControls:
    """The switches and parameter widgets of all methods for one model; create it inside a `gr.Blocks`.

    Only the parameters of methods that are switched on are shown, the basic ones first.
    """

    def __init__(self, model: str, preset: Preset):
        """Create the widgets with the values of a preset."""
        self.switches: dict[str, gr.Checkbox] = {}
        self.groups: dict[str, gr.Column] = {}
        self.parameters: dict[str, dict[str, gr.components.Component]] = {}
        active = preset_methods(preset)
        with gr.Row(elem_id="switches"):
            self._add_switches(model, active, peers=False)
        with gr.Accordion("Caches of others, to compare with", open=False, elem_id="peers", elem_classes="advanced"):
            self._add_switches(model, active, peers=True)
        for name, method in METHODS.items():
            on = name in active and is_usable(name, model)
            with gr.Column(visible=on, elem_classes="knobs", elem_id=f"knobs-{name}") as self.groups[name]:
                paper = f" · [{method.paper}](https://arxiv.org/abs/{method.paper[6:]})" if method.paper else ""
                gr.Markdown(f"**{method.title}**{paper}")
                self.parameters[name] = self._parameters(active.get(name) or method(), available_values(name, model))

    def _add_switches(self, model: str, active: dict[str, Method], peers: bool) -> None:
        for name, method in METHODS.items():
            if method.peer == peers:
                lacks = missing_part(name, model)
                self.switches[name] = gr.Checkbox(
                    name in active and not lacks, label=method.title, elem_id=f"use-{name}", min_width=90,
                    interactive=not lacks, info=LACKING.get(lacks, ""),
                )  # fmt: skip

    def _parameters(self, method: Method, available: AvailableValues) -> dict[str, gr.components.Component]:
        """The widgets of a method: the basic ones, and the others in a closed part."""
        widgets = {
            name: widget(name, method, available) for name in method.parameters() if name in method.basic
        }  # fmt: skip
        if others := [name for name in method.parameters() if name not in method.basic]:
            with gr.Accordion(f"Advanced: {len(others)} more", open=False, elem_classes="advanced"):
                widgets |= {name: widget(name, method, available) for name in others}
        return {name: widgets[name] for name in method.parameters()}

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

    def preset_values(self, preset: Preset, model: str) -> tuple[Update, list[str]]:
        """Value and range of every component for a preset on a model, and what the model lacks of it, in words."""
        updates, active = {}, preset_methods(preset)
        for name, method in METHODS.items():
            wanted, lacks, available = active.get(name), missing_part(name, model), available_values(name, model)
            ranges = {key: range_of(schema, available.get(key)) for key, schema in method.parameters().items()}
            on = wanted is not None and not lacks
            info = LACKING.get(lacks, "")
            updates[self.switches[name]] = gr.update(value=on, interactive=not lacks, info=info)
            updates[self.groups[name]] = gr.update(visible=on)
            for parameter, component in self.parameters[name].items():
                value = getattr(wanted or method(), parameter)
                nearest = nearest_available(value, available.get(parameter))
                updates[component] = gr.update(value=nearest, elem_classes=["knob"], **ranges[parameter])
        return updates, missing_parts(preset, model)

    def visibility(self, values: list[Any]) -> Update:
        """Which methods' parameters are shown, from the values of `components`."""
        return {group: gr.update(visible=bool(on)) for group, on in zip(self.groups.values(), values)}

    def marks(self, changes: list[Change]) -> Update:
        """Marks of the widgets: those of `changes` get the class "changed"."""
        changed = {(change.method, change.parameter) for change in changes}
        return {
            component: gr.update(elem_classes=["knob", "changed"] if (name, parameter) in changed else ["knob"])
            for name, widgets in self.parameters.items() for parameter, component in widgets.items()
        }  # fmt: skip


def changes_from(preset: Preset, settings: dict[str, dict], model: str) -> list[Change]:
    """The parameters of the active methods that differ from a preset, or from the defaults of a method it lacks."""
    wanted, changes = preset_methods(preset), []
    for name, parameters in settings.items():
        base, available = wanted.get(name) or METHODS[name](), available_values(name, model)
        for parameter, value in parameters.items():
            preset_value = nearest_available(getattr(base, parameter), available.get(parameter))
            if value != preset_value:
                changes.append(Change(name, parameter, value, preset_value))
    return changes


def is_usable(name: str, model: str) -> bool:
    """Whether a method can run on a model."""
    return not missing_part(name, model)


def missing_part(name: str, model: str) -> str:
    """What a method lacks to run on a model, in words; empty if nothing."""
    if not METHODS[name].is_installed():
        return PACKAGE
    return "" if all(available_values(name, model).values()) else WEIGHTS  # no values: no weights


def missing_parts(preset: Preset, model: str) -> list[str]:
    """What of a preset is not there for a model, in words; empty if it runs in full."""
    missing = []
    for name, method in preset_methods(preset).items():
        if lacks := missing_part(name, model):
            missing.append(f"{method.title} is off, without {lacks}")
            continue
        for parameter, choices in available_values(name, model).items():
            value = getattr(method, parameter)
            if (nearest := nearest_available(value, choices)) != value:
                missing.append(f"{method.title}'s {words(parameter)} is {nearest} instead of {value}")
    return missing


def available_values(name: str, model: str) -> AvailableValues:
    """The values of a method's restricted parameters for a model."""
    return METHODS[name].available_values(resolve(model))


def widget(name: str, method: Method, available: AvailableValues) -> gr.components.Component:
    """The widget of a parameter; label, help, range and value all come from its field."""
    schema, choices = method.parameters()[name], available.get(name)
    common = {
        "label": words(name), "info": schema.get("description", ""), "min_width": 220,
        "value": nearest_available(getattr(method, name), choices),
        "elem_id": "-".join([*re.findall(r"\w+", method.title.lower()), name]), "elem_classes": ["knob"],
    }  # fmt: skip
    if schema["type"] == "boolean":
        return gr.Checkbox(**common)
    if "enum" in schema or isinstance(choices, list):
        return gr.Dropdown(choices or schema["enum"], **common)
    step = schema.get("multipleOf", 1 if schema["type"] == "integer" else 0.01)
    low, high = choices or (schema["minimum"], schema["maximum"])
    return ClampedSlider(low, high, step=step, buttons=[], **common)


def range_of(schema: dict[str, Any], choices: Choices | None) -> dict[str, Any]:
    """What a parameter's widget may take: what the model has, or where it has nothing, all that the field allows."""
    if isinstance(choices, tuple):
        return {"minimum": choices[0], "maximum": choices[1]}
    if choices or "enum" in schema:
        return {"choices": choices or schema["enum"]}
    return {end: schema[end] for end in ("minimum", "maximum") if end in schema}


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
    whole = lambda name, v: types[name] == "integer" and isinstance(v, float) and v.is_integer()
    return {name: int(v) if whole(name, v) else v for name, v in values.items()}


def preset_methods(preset: Preset) -> dict[str, Method]:
    """The methods of a preset by name."""
    return dict(zip(preset.methods, preset))


def words(name: str) -> str:
    """A parameter's name in words."""
    return name.replace("_", " ")
