"""What the sides of a pair are called in a ranking, and what differs between two pairs."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from accel.methods import METHODS
from accel.runtime.models import TINY
from accel.runtime.presets import RUN_SETTINGS, load_preset, preset_names
from accel.runtime.repeat import reference_of
from ui.controls import words
from ui.side_settings import describe_side

RUN_KEYS = ("model", "prompt", "seed", "frames", "height", "width")
SIDES = {"b": "", "a": "reference "}  # prefix of a setting's name


class Difference(NamedTuple):
    """A setting that differs between two runs, and its value in each."""

    name: str
    first: str
    second: str


def run_of(report: dict, side: str) -> dict[str, Any]:
    """The run of one side of a report: its steps, guidance, methods, solver and shift."""
    return report if side == "b" else reference_of(report)


def preset_words(preset: dict[str, Any]) -> str:
    """The settings of a preset in words: {"methods": {"gpd": {"steps": 6}}} is "GPD with steps 6"."""
    parts = []
    for name, parameters in preset.get("methods", {}).items():
        own = ", ".join(f"{words(parameter)} {_text(value)}" for parameter, value in parameters.items())
        parts.append(f"{METHODS[name].title} with {own}" if own else METHODS[name].title)
    run = [f"{key} {_text(preset[key])}" for key in RUN_SETTINGS if key in preset]
    return ", ".join([" and ".join(parts) or "No method", *run])


def ranked_name(report: dict, side: str) -> str:
    """What one side of a report is called in a ranking: its preset or methods, its steps, and the model if not shipped.

    Votes on the same name count together, so parameters that no preset has are told.
    """
    run = run_of(report, side)
    methods = _all_parameters(run["methods"])
    preset = next((name for name, presets_methods in _presets().items() if presets_methods == methods), None)
    name = preset or " + ".join([*methods]) + " with own parameters" if methods else "plain"
    model = "" if report["model"] == TINY else f" ({Path(report['model']).name})"
    return describe_side({**run, "methods": [name]}) + model


def differences(first: dict, second: dict) -> list[Difference]:
    """The settings that differ between two reports, with their values as text.

    Parameters are listed of the methods that both have; a method that only one has is seen by its name.
    """
    a, b = settings(first), settings(second)
    return [Difference(name, a[name], b[name]) for name in a if name in b and a[name] != b[name]]


def settings(report: dict) -> dict[str, str]:
    """{name: value} of everything that determines the two videos of a report, as text."""
    found = {key: _text(report.get(key)) for key in RUN_KEYS}
    for side, prefix in SIDES.items():
        run = run_of(report, side)
        found |= {prefix + key: _text(run.get(key)) for key in RUN_SETTINGS}
        found |= {prefix + "methods": " + ".join(run["methods"]) or "none"}
        for name, values in _all_parameters(run["methods"]).items():
            found |= {f"{prefix}{name}.{key}": _text(value) for key, value in values.items()}
    return found


def _all_parameters(methods: dict[str, dict]) -> dict[str, dict]:
    return {name: _with_defaults(name, values) for name, values in methods.items()}


@cache
def _presets() -> dict[str, dict]:
    """{preset: its methods with all their parameters}."""
    return {name: _all_parameters(load_preset(name).methods) for name in preset_names()}


def _with_defaults(name: str, values: dict) -> dict[str, Any]:
    """All parameters of a method; of one that does not exist any more, those that were given."""
    fields = METHODS[name].model_fields if name in METHODS else {}
    return {key: field.get_default(call_default_factory=True) for key, field in fields.items()} | (values or {})


def _text(value: Any) -> str:
    if value is None or value == "default":
        return "default"
    return f"{value:g}" if isinstance(value, float) else str(value)
