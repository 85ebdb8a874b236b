"""Presets: YAML files of methods and run settings. They are checked strictly; errors say what is allowed."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from functools import cache
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, Field, ValidationError

from ..errors import AccelError, quote
from ..methods import METHODS, Method
from ..methods.base import check_combination
from .paths import ROOT

FOLDER = ROOT / "presets"
DEFAULT_PRESET = "stepcache"  # of commands and the page: it needs nothing that belongs to one model
Solver = Literal["default", "unipc", "euler", "dpm++2m", "dpm++2s"]  # "default": the model's own
RUN_SETTINGS = ("steps", "guidance", "solver", "shift")  # of a run, that a preset may hold beside its methods
OWN_NOISE_LEVELS = {"solver": "default", "shift": None}  # values of a run with the model's or a method's noise levels
MAX_SENTENCE = 300  # characters of what a validator says of a value
M = TypeVar("M", bound=BaseModel)


class Preset(BaseModel, frozen=True, extra="forbid"):
    """Methods {name: {parameter: value}} from the innermost to the outermost, and their run settings.

    Iterating over a preset gives its methods.
    """

    title: str = ""  # shown on the page in place of the name
    about: str = ""
    steps: int | None = Field(None, ge=1, le=1000)
    guidance: float | None = Field(None, ge=0, le=30)
    solver: Solver = "default"
    shift: float | None = Field(None, ge=0.1, le=20)
    methods: dict[str, dict] = {}

    def __iter__(self) -> Iterator[Method]:
        return iter(build_methods(self.methods))

    def settings(self) -> dict[str, Any]:
        """The methods, and those of `RUN_SETTINGS` that are not the model's own."""
        return {"methods": self.methods, **self.model_dump(include=set(RUN_SETTINGS), exclude_defaults=True)}


def build_methods(settings: dict[str, dict]) -> list[Method]:
    """The methods of {name: {parameter: value}}. Raises AccelError naming an unknown method or a wrong parameter."""
    return [checked(METHODS[name], values, f"{name}.") for name, values in normalize_methods(settings).items()]


def normalize_methods(settings: Any) -> dict[str, dict]:
    """Settings of methods from untrusted values. Raises AccelError for what cannot be {method: {parameter: value}}."""
    if not isinstance(settings, dict):
        raise AccelError(f"methods = {quote(settings)} is not allowed: write {{method: {{parameter: value}}}}")
    methods = {}
    for name, parameters in settings.items():
        if name not in METHODS:
            raise AccelError(f"unknown method {quote(name)}; known are {', '.join(METHODS)}")
        if not isinstance(parameters, dict | None):
            raise AccelError(f"{name} = {quote(parameters)} is not allowed: write {{parameter: value}}")
        methods[name] = normalize(METHODS[name], parameters or {}, f"{name}.")
    return methods


def with_parameter(methods: dict[str, dict], method: str, parameter: str, value: Any) -> dict[str, dict]:
    """Methods with a parameter of one of them changed.

    A method that is new among them comes before those that stand behind it in `METHODS`: a fitted solver has to be
    outside of what skips calls.
    """
    changed = {name: dict(values) for name, values in methods.items()}
    if method not in changed:
        order = list(METHODS)
        behind = order[order.index(method) :] if method in METHODS else []
        before = dict(takewhile(lambda item: item[0] not in behind, changed.items()))
        changed = {**before, method: {}, **changed}
    changed[method][parameter] = value
    return changed


def checked(model: type[M], values: dict[str, Any], prefix: str = "") -> M:
    """A model of untrusted values. Raises AccelError in one sentence; `prefix` comes before the names in it."""
    try:
        return model(**normalize(model, values, prefix))
    except ValidationError as error:
        raise AccelError(explain(error, model, prefix)) from None


def normalize(model: type[BaseModel], values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values of a model's fields with whole floats as integers.

    Raises AccelError where pydantic would turn a value of one kind into another: a text or a boolean into a number.
    """
    fields, normal = _fields(model), {}
    for name, value in values.items():
        if name not in fields:
            raise AccelError(f"unknown setting {prefix}{_plain(name)}; known are {', '.join(fields)}")
        kind = field_schema(model, name).get("type")
        if kind == "integer" and isinstance(value, float) and value.is_integer():
            value = int(value)
        if not (_is_kind(value, kind) or (value is None and "anyOf" in fields[name])):
            raise AccelError(f"{prefix}{name} = {quote(value)} is not allowed: {describe_range(model, name)}")
        normal[name] = value
    return normal


def _is_kind(value: Any, kind: str | None) -> bool:
    """Whether a value is of a kind of JSON schema. Lists and objects are left to the model."""
    if kind in ("integer", "number"):
        number = isinstance(value, int) or (kind == "number" and isinstance(value, float) and math.isfinite(value))
        return number and not isinstance(value, bool)
    if kind == "string":
        return isinstance(value, str) and is_text(value)
    return kind != "boolean" or isinstance(value, bool)


def is_text(value: str) -> bool:
    """Whether a string is Unicode: halves of surrogate pairs, which JSON can hold, are not."""
    return not any("\ud800" <= char <= "\udfff" for char in value)


def _plain(name: Any) -> str:
    """A name as it is if it looks like one of ours, else quoted."""
    return name if isinstance(name, str) and name.isidentifier() and len(name) < 60 else quote(name)


@cache
def _fields(model: type[BaseModel]) -> dict[str, dict]:
    """The JSON schema of each field of a model."""
    return model.model_json_schema()["properties"]


def field_schema(model: type[BaseModel], name: str) -> dict:
    """The JSON schema of a field's values other than null; empty for an unknown field."""
    field = _fields(model).get(name, {})
    return next((s for s in field.get("anyOf", []) if s.get("type") != "null"), field)


def required_settings(settings: dict[str, dict]) -> dict[str, Any]:
    """What methods decide of a run: for a student and a fitted solver all of `RUN_SETTINGS`, for others nothing.

    Raises AccelError if some do not go together.
    """
    methods = build_methods(settings)
    check_combination(methods)
    required = {name: method.required_settings() for name, method in zip(settings, methods)}
    required = {name: values for name, values in required.items() if values}
    if len(required) > 1:
        raise AccelError(f"{' and '.join(required)} do not go together: each brings its own noise levels")
    return next(({**values, **OWN_NOISE_LEVELS} for values in required.values()), {})


def explain(error: ValidationError, model: type[BaseModel], prefix: str = "") -> str:
    """One sentence about the first problem: which parameter, its value, and what is allowed."""
    first = error.errors()[0]
    path = ".".join(map(_plain, first["loc"]))
    if first["type"] == "value_error":  # raised by a validator, of one field or of the model
        sentence = f"{(prefix + path).rstrip('.')}: {first['ctx']['error']}"
        return sentence if len(sentence) <= MAX_SENTENCE else sentence[: MAX_SENTENCE - 1] + "…"
    path, parameter = path or "?", str(first["loc"][0]) if first["loc"] else "?"
    if first["type"] == "extra_forbidden":
        return f"unknown setting {prefix}{path}; known are {', '.join(model.model_fields)}"
    if first["type"] == "missing":
        return f"{prefix}{path} is missing: give {describe_range(model, parameter)}"
    allowed = describe_range(model, parameter) if path == parameter else first["msg"]
    return f"{prefix}{path} = {quote(first['input'])} is not allowed: {allowed}"


def describe_range(model: type[BaseModel], parameter: str) -> str:
    """The values that a field takes, in words."""
    schema = field_schema(model, parameter)
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
    if not os.path.isfile(path):  # false for what cannot be a path, too
        raise AccelError(f"no preset {quote(str(name))}; there are {', '.join(preset_names())}, or give a .yaml file")
    try:
        data = yaml.safe_load(path.read_text()) or {}
    except (yaml.YAMLError, ValueError) as error:  # a day that no month has, text that is not UTF-8
        raise AccelError(f"{path.name} is not a valid preset: {str(error).splitlines()[0]}") from None
    if not isinstance(data, dict):
        raise AccelError(f"{path.name} is not a valid preset: it must be a mapping with {', '.join(_fields(Preset))}")
    try:
        preset = checked(Preset, data)
        build_methods(preset.methods)
    except AccelError as error:
        raise AccelError(f"{path.name}: {error}") from None
    return preset


def preset_names() -> list[str]:
    """Names of the shipped presets, sorted; those of peers, which have the peer's name, come last."""
    is_peer = lambda name: name in METHODS and METHODS[name].peer
    return sorted((p.stem for p in FOLDER.glob("*.yaml")), key=lambda name: (is_peer(name), name))
