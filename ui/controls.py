"""A method's fields as Gradio widgets, and widget values as a method's settings."""

from __future__ import annotations

from typing import Any

import gradio as gr

from accel.methods import Method
from accel.methods.base import Choices


def widgets(method: Method, available_values: dict[str, Choices] | None = None) -> dict[str, gr.components.Component]:
    """One widget per field: what it is called, what it costs, and its range, all from the field itself; its value.

    `offered`: the values that some knobs have for the model at hand (`Method.offered`).
    """
    made, available_values = {}, available_values or {}
    for name, schema in method.parameters().items():
        common = {"label": name.replace("_", " "), "info": schema.get("description", ""), "min_width": 220}
        common["value"] = nearest_available(getattr(method, name), available_values.get(name))
        common["elem_id"] = f"{method.title.lower()}-{name}"
        if schema["type"] == "boolean":
            made[name] = gr.Checkbox(**common, elem_classes="flag")  # its row would make it too narrow for its words
        elif "enum" in schema:
            made[name] = gr.Radio(available_values.get(name) or schema["enum"], **common)
        else:
            step = schema.get("multipleOf", 1 if schema["type"] == "integer" else 0.01)
            low, high = available_values.get(name) or (schema["minimum"], schema["maximum"])
            made[name] = gr.Slider(low, high, step=step, **common)
    return made


def nearest_available(value: Any, available_values: Choices | None) -> Any:
    """A knob's value, or the nearest thing to it that the model at hand offers."""
    if isinstance(available_values, tuple):
        return min(max(value, available_values[0]), available_values[1])
    if not available_values or value in available_values:
        return value
    return (
        min(available_values, key=lambda other: abs(other - value))
        if isinstance(value, (int, float))
        else available_values[0]
    )


def settings(method: type[Method], values: dict[str, Any]) -> dict[str, Any]:
    """Knob values as the method wants them: sliders give floats where whole numbers are meant."""
    kinds = {name: schema["type"] for name, schema in method.parameters().items()}
    return {name: int(v) if kinds[name] == "integer" and float(v).is_integer() else v for name, v in values.items()}
