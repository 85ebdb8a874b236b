"""Presets: YAML files of methods and run settings, checked strictly, with errors that say what is allowed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import yaml
from pydantic import BaseModel, Field, ValidationError

from ..methods import METHODS, Method
from .paths import ROOT

FOLDER = ROOT / "presets"


class Preset(BaseModel, frozen=True, extra="forbid"):
    """Methods in their order, inner to outer, and the run settings that belong to them."""

    about: str = ""
    steps: int | None = Field(None, ge=1, le=1000)
    guidance: float | None = Field(None, ge=0, le=30)
    methods: dict[str, dict] = {}

    def __iter__(self) -> Iterator[Method]:
        return iter(build_methods(self.methods))


def build_methods(settings: dict[str, dict]) -> list[Method]:
    """The methods of {name: {knob: value}}. Raises ValueError naming the unknown name or the knob and its range."""
    built = []
    for name, parameters in settings.items():
        if name not in METHODS:
            raise ValueError(f"unknown method {name!r}; known are {', '.join(METHODS)}")
        try:
            built.append(METHODS[name](**(parameters or {})))
        except ValidationError as error:
            raise ValueError(explain(error, METHODS[name], f"{name}.")) from None
    return built


def required_settings(settings: dict[str, dict]) -> dict[str, float]:
    """What the methods demand of a run's `steps` and `guidance`. Raises ValueError naming two that do."""
    asked = {
        name: own for name, method in zip(settings, build_methods(settings)) if (own := method.required_settings())
    }
    if len(asked) > 1:
        raise ValueError(f"{' and '.join(asked)} do not go together: each runs a student in the model's place")
    return next(iter(asked.values()), {})


def explain(error: ValidationError, model: type[BaseModel], prefix: str = "") -> str:
    """One sentence about the first problem: which knob, what was given, what is allowed."""
    first = error.errors()[0]
    where = ".".join(map(str, first["loc"]))
    if first["type"] == "value_error":  # a check of the model's own, of one field or of all together
        return f"{(prefix + where).rstrip('.')}: {first['ctx']['error']}"
    where, knob = where or "?", str(first["loc"][0]) if first["loc"] else "?"
    if first["type"] == "extra_forbidden":
        return f"unknown setting {prefix}{knob}; known are {', '.join(model.model_fields)}"
    may_be = describe_range(model, knob) if where == knob else first["msg"]
    return f"{prefix}{where} = {first['input']!r} is not allowed: {may_be}"


def describe_range(model: type[BaseModel], knob: str) -> str:
    """The values a field takes, in words."""
    schema = model.model_json_schema()["properties"].get(knob, {})
    schema = next((s for s in schema.get("anyOf", []) if s.get("type") != "null"), schema)
    if "enum" in schema:
        return "one of " + ", ".join(map(str, schema["enum"]))
    kind = {"integer": "a whole number", "number": "a number", "boolean": "true or false", "string": "a text"}
    text = kind.get(schema.get("type"), "a valid value")
    low, high = schema.get("minimum"), schema.get("maximum")
    text += f" from {low} to {high}" if low is not None and high is not None else ""
    return text + (f" in steps of {schema['multipleOf']:g}" if "multipleOf" in schema else "")


def load_preset(name: str | Path) -> Preset:
    """The preset of that name in `presets/`, or of a YAML file. Raises ValueError saying what is wrong."""
    path = Path(name) if str(name).endswith((".yaml", ".yml")) else FOLDER / f"{name}.yaml"
    if not path.is_file():
        raise ValueError(f"no preset {str(name)!r}; there are {', '.join(preset_names())}, or give a .yaml file")
    try:
        data = yaml.safe_load(path.read_text()) or {}
        preset = Preset(**data)
    except (yaml.YAMLError, TypeError) as error:
        raise ValueError(f"{path.name} is not a valid preset: {str(error).splitlines()[0]}") from None
    except ValidationError as error:
        raise ValueError(f"{path.name}: {explain(error, Preset)}") from None
    build_methods(preset.methods)
    return preset


def preset_names() -> list[str]:
    """Names of the shipped presets, sorted."""
    return sorted(p.stem for p in FOLDER.glob("*.yaml"))
