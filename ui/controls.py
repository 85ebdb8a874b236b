"""A method's fields as Gradio widgets, and widget values as a method's settings."""

from __future__ import annotations

from typing import Any

import gradio as gr

from accel.methods import Method
from accel.methods.base import Offered


def widgets(method: Method, offered: dict[str, Offered] | None = None) -> dict[str, gr.components.Component]:
    """One widget per field: what it is called, what it costs, and its range, all from the field itself; its value.

    `offered`: the values that some knobs have for the model at hand (`Method.offered`).
    """
    made, offered = {}, offered or {}
    for name, schema in method.knobs().items():
        common = {"label": name.replace("_", " "), "info": schema.get("description", ""), "min_width": 220}
        common["value"] = possible(getattr(method, name), offered.get(name))
        common["elem_id"] = f"{method.title.lower()}-{name}"
        if schema["type"] == "boolean":
            made[name] = gr.Checkbox(**common, elem_classes="flag")  # its row would make it too narrow for its words
        elif "enum" in schema:
            made[name] = gr.Radio(offered.get(name) or schema["enum"], **common)
        else:
            step = schema.get("multipleOf", 1 if schema["type"] == "integer" else 0.01)
            low, high = offered.get(name) or (schema["minimum"], schema["maximum"])
            made[name] = gr.Slider(low, high, step=step, **common)
    return made


def possible(value: Any, offered: Offered | None) -> Any:
    """A knob's value, or the nearest thing to it that the model at hand offers."""
    if isinstance(offered, tuple):
        return min(max(value, offered[0]), offered[1])
    if not offered or value in offered:
        return value
    return min(offered, key=lambda other: abs(other - value)) if isinstance(value, (int, float)) else offered[0]


def settings(method: type[Method], values: dict[str, Any]) -> dict[str, Any]:
    """Knob values as the method wants them: sliders give floats where whole numbers are meant."""
    kinds = {name: schema["type"] for name, schema in method.knobs().items()}
    return {name: int(v) if kinds[name] == "integer" and float(v).is_integer() else v for name, v in values.items()}
