"""Presets: YAML files of methods and run settings. They are checked strictly; errors say what is allowed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import yaml
from pydantic import BaseModel, Field, ValidationError

from ..errors import AccelError
from ..methods import METHODS, Method
from .paths import ROOT

FOLDER = ROOT / "presets"


class Preset(BaseModel, frozen=True, extra="forbid"):
    """Methods {name: {parameter: value}} from the innermost to the outermost, and their run settings.

    Iterating over a preset gives its methods.
    """

    title: str = ""  # shown on the page in place of the name
    about: str = ""
    steps: int | None = Field(None, ge=1, le=1000)
    guidance: float | None = Field(None, ge=0, le=30)
    methods: dict[str, dict] = {}

    def __iter__(self) -> Iterator[Method]:
        return iter(build_methods(self.methods))


def build_methods(settings: dict[str, dict]) -> list[Method]:
    """The methods of {name: {parameter: value}}. Raises AccelError naming an unknown method or a wrong parameter."""
    methods = []
    for name, parameters in settings.items():
        if name not in METHODS:
            raise AccelError(f"unknown method {name!r}; known are {', '.join(METHODS)}")
        try:
            methods.append(METHODS[name](**(parameters or {})))
        except ValidationError as error:
            raise AccelError(explain(error, METHODS[name], f"{name}.")) from None
    return methods


def required_settings(settings: dict[str, dict]) -> dict[str, float]:
    """The `steps` and `guidance` that methods require of a run. Raises AccelError if two of them require any."""
    required = {name: method.required_settings() for name, method in zip(settings, build_methods(settings))}
    required = {name: values for name, values in required.items() if values}
    if len(required) > 1:
        raise AccelError(f"{' and '.join(required)} do not go together: each replaces the model by a student")
    return next(iter(required.values()), {})


def explain(error: ValidationError, model: type[BaseModel], prefix: str = "") -> str:
    """One sentence about the first problem: which parameter, its value, and what is allowed."""
    first = error.errors()[0]
    path = ".".join(map(str, first["loc"]))
    if first["type"] == "value_error":  # raised by a validator, of one field or of the model
        return f"{(prefix + path).rstrip('.')}: {first['ctx']['error']}"
    path, parameter = path or "?", str(first["loc"][0]) if first["loc"] else "?"
    if first["type"] == "extra_forbidden":
        return f"unknown setting {prefix}{parameter}; known are {', '.join(model.model_fields)}"
    allowed = describe_range(model, parameter) if path == parameter else first["msg"]
    return f"{prefix}{path} = {first['input']!r} is not allowed: {allowed}"


def describe_range(model: type[BaseModel], parameter: str) -> str:
    """The values that a field takes, in words."""
    schema = model.model_json_schema()["properties"].get(parameter, {})
    schema = next((s for s in schema.get("anyOf", []) if s.get("type") != "null"), schema)
    if "enum" in schema:
        return "one of " + ", ".join(map(str, schema["enum"]))
    kinds = {"integer": "a whole number", "number": "a number", "boolean": "true or false", "string": "a text"}
    text = kinds.get(schema.get("type"), "a valid value")
    low, high = schema.get("minimum"), schema.get("maximum")
    text += f" from {low} to {high}" if low is not None and high is not None else ""
    return text + (f" in steps of {schema['multipleOf']:g}" if "multipleOf" in schema else "")


def load_preset(name: str | Path) -> Preset:
    """The preset of a name in `presets/` or of a YAML file. Raises AccelError saying what is wrong with it."""
    path = Path(name) if str(name).endswith((".yaml", ".yml")) else FOLDER / f"{name}.yaml"
    if not path.is_file():
        raise AccelError(f"no preset {str(name)!r}; there are {', '.join(preset_names())}, or give a .yaml file")
    try:
        data = yaml.safe_load(path.read_text()) or {}
        preset = Preset(**data)
    except (yaml.YAMLError, TypeError) as error:
        raise AccelError(f"{path.name} is not a valid preset: {str(error).splitlines()[0]}") from None
    except ValidationError as error:
        raise AccelError(f"{path.name}: {explain(error, Preset)}") from None
    build_methods(preset.methods)
    return preset


def preset_names() -> list[str]:
    """Names of the shipped presets, sorted."""
    return sorted(p.stem for p in FOLDER.glob("*.yaml"))
