"""A sweep: values on one or two axes around a setting, read from text, checked, and expanded to settings.

steps=20,30,50        fastercache.attention_interval=2..6        asymrnr.budget=0.4..0.8:0.1
"""

from __future__ import annotations

import re
from collections.abc import Container, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from itertools import product
from math import prod
from typing import Any

from pydantic import BaseModel

from ..errors import AccelError
from ..methods import METHODS
from ..runtime.models import ModelDefaults, resolve
from ..runtime.presets import (
    RUN_SETTINGS,
    Preset,
    build_methods,
    describe_range,
    field_schema,
    load_preset,
    preset_names,
    required_settings,
    with_parameter,
)
from ..runtime.run import Run, build_run

MAX_CELLS = 64
NO_PRESET = "none"
RUN_AXES = (*RUN_SETTINGS, "seed")
NUMBER = r"-?\d{1,19}(?:\.\d{1,9})?"
RANGE = re.compile(rf"({NUMBER})\s*\.\.\s*({NUMBER})(?:\s*:\s*({NUMBER}))?")
GRAMMAR = "write values as 2,4,6, a range as 2..6, or a range with its step as 0.2..0.4:0.05"


@dataclass(frozen=True)
class Axis:
    """A setting that a sweep varies ("preset", a field of `Run`, or METHOD.PARAMETER), and its values."""

    name: str
    values: tuple


@dataclass(frozen=True)
class Cell:
    """One setting of a sweep: its place on the axes, and its arguments of `build_run`, without the common ones.

    `plain`: the stock pipeline at another number of steps, next to the grid.
    """

    values: dict[str, Any]
    settings: dict[str, Any] = field(compare=False)
    plain: bool = False

    @property
    def label(self) -> str:
        """Its values in words, as "attention interval 3, 20 steps"."""
        return ", ".join(["plain"] * self.plain + [value_label(name, value) for name, value in self.values.items()])


def value_label(name: str, value: Any) -> str:
    """A value with the name of its axis: "20 steps", "attention interval 3", "gpd.steps 6", "euler"."""
    if name == "steps":
        return f"{value} step{'s' * (value != 1)}"
    if name in ("preset", "solver"):
        return "no method" if value == NO_PRESET else str(value)
    parameter = name.rpartition(".")[2]
    return f"{name if parameter in RUN_AXES else parameter.replace('_', ' ')} {value_text(value)}"


def axis_names() -> list[str]:
    """Everything that an axis can vary and that the page shows."""
    parameters = [f"{name}.{parameter}" for name, method in METHODS.items() for parameter in method.parameters()]
    return ["preset", *RUN_AXES, *parameters]


def axis_range(name: str) -> str:
    """The values that an axis takes, in words. Raises AccelError for an unknown axis."""
    if name == "preset":
        return "one of " + ", ".join([*preset_names(), NO_PRESET])
    return describe_range(*_field(name))


def parse_axis(name: str, text: str) -> Axis:
    """An axis from its name and its values as text. Raises AccelError in one sentence for what is not allowed."""
    name, schema = name.strip(), _schema(name.strip())
    values: dict[Any, None] = {}  # a set in the order of the text
    for item in _items(name, text):
        values |= dict.fromkeys(_expand(name, schema, item))
        if len(values) > MAX_CELLS:
            raise _too_many(f"{name} has more than {MAX_CELLS} values")
    for value in values:
        _check(name, value)
    return Axis(name, tuple(values))


def parse_axis_option(option: str) -> Axis:
    """An axis from "name=values"."""
    name, equals, text = option.partition("=")
    if not equals:
        raise AccelError(f"axis {option!r} is not understood: write steps=20,30,50 or method.parameter=2..6")
    return parse_axis(name, text)


def parse_steps(text: str) -> tuple[int, ...]:
    """Step counts from text; empty for an empty text."""
    return parse_axis("steps", text).values if text.strip() else ()


def count(axes: Sequence[Axis], plain_steps: Sequence[int] = ()) -> int:
    """The number of settings, without expanding them. Raises AccelError if they are too many."""
    names = [axis.name for axis in axes]
    if not 1 <= len(names) <= 2:
        raise AccelError(f"a sweep has one or two axes, not {len(names)}")
    if len(set(names)) < len(names):
        raise AccelError(f"both axes are {names[0]}: choose another one, or give all values on one axis")
    number = prod(len(axis.values) for axis in axes) + len(plain_steps)
    if number > MAX_CELLS:
        raise _too_many(f"the sweep has {number} settings")
    return number


def expand(
    base: dict, axes: Sequence[Axis], reference: dict | None = None, plain_steps: Sequence[int] = ()
) -> list[Cell]:
    """The cells of a sweep, row by row: the first axis gives the rows. Plain cells come last.

    `base` and `reference` are arguments of `build_run`; plain cells are the reference without methods and what these
    require. A student's own steps and guidance replace those of `base`. Raises AccelError for too many cells, or two
    students in one.
    """
    count(axes, plain_steps)
    combinations = product(*(axis.values for axis in axes))
    places = [dict(zip([axis.name for axis in axes], values)) for values in combinations]
    stock = base if reference is None else reference
    required = required_settings(stock.get("methods", {}))
    plain = {**{key: value for key, value in stock.items() if key not in required}, "methods": {}}
    return [
        *(Cell(place, _settings(base, place)) for place in places),
        *(Cell({"steps": steps}, {**plain, "steps": steps}, plain=True) for steps in plain_steps),
    ]


def with_student(settings: dict, kept: Container[str] = ()) -> dict:
    """Settings with what their methods require of the run, but for the names in `kept`."""
    required = required_settings(settings["methods"])
    return {**settings, **{key: value for key, value in required.items() if key not in kept}}


def check_available(cell: Cell, model: str) -> None:
    """Raise AccelError if a model lacks the student or predictor that a cell needs."""
    methods = zip(cell.settings["methods"], build_methods(cell.settings["methods"]))
    for name, method in ((name, method) for name, method in methods if not method.names_weights):
        for parameter, choices in method.available_values(resolve(model)).items():
            value = getattr(method, parameter)
            if not choices:
                raise AccelError(f"{name} needs weights that have not been trained for {model}")
            if not (choices[0] <= value <= choices[1] if isinstance(choices, tuple) else value in choices):
                allowed = " to ".join(map(value_text, choices)) if isinstance(choices, tuple) else _listing(choices)
                raise AccelError(f"{name}.{parameter} = {value_text(value)} is not there for {model}: it has {allowed}")


def value_text(value: Any) -> str:
    """A value as one writes it in the text of an axis."""
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def _settings(base: dict, place: dict[str, Any]) -> dict:
    """`base` with the values of one place; a preset comes before the parameters that change it."""
    settings = {"methods": {}, **base}
    if "preset" in place:
        preset = Preset() if place["preset"] == NO_PRESET else load_preset(place["preset"])
        settings |= preset.settings()
    for name, value in place.items():
        method, _, parameter = name.rpartition(".")
        if method:
            settings["methods"] = with_parameter(settings["methods"], method, parameter, value)
        elif name != "preset":
            settings[name] = value
    return with_student(settings, place)


def _field(name: str) -> tuple[type[BaseModel], str]:
    """The model and the field behind an axis."""
    if name in RUN_AXES:
        return Run, name
    method, _, parameter = name.partition(".")
    if method not in METHODS or not parameter:
        known = ", ".join(["preset", *RUN_AXES])
        raise AccelError(f"unknown axis {name!r}; there are {known} and METHOD.PARAMETER, with {', '.join(METHODS)}")
    if parameter not in METHODS[method].parameters():
        known = ", ".join(METHODS[method].parameters())
        raise AccelError(f"unknown axis {name!r}; the parameters of {method} are {known}")
    return METHODS[method], parameter


def _schema(name: str) -> dict:
    """The JSON schema of an axis: its type, and its listed values if it has some."""
    if name == "preset":
        return {"type": "string"}
    return field_schema(*_field(name))


def _items(name: str, text: str) -> list[str]:
    items = [item.strip() for item in text.split(",")]
    if len(items) > MAX_CELLS:
        raise _too_many(f"{name} has {len(items)} values")
    if "" in items:
        raise AccelError(f"{name}: a value is missing: {GRAMMAR}")
    return items


def _expand(name: str, schema: dict, item: str) -> list:
    """The values of one item of the text: of a range, or a single one."""
    if schema["type"] not in ("integer", "number"):
        return [{"true": True, "false": False}.get(item.lower(), item) if schema["type"] == "boolean" else item]
    if ".." not in item:
        return [_number(schema, item)]
    found = RANGE.fullmatch(item)
    if not found:
        raise AccelError(f"{name}: {item!r} is not understood: {GRAMMAR}")
    low, high, step = (Decimal(part) if part else None for part in found.groups())
    if "enum" in schema and step is None:  # a range of listed numbers has those that are listed
        return [value for value in schema["enum"] if low <= value <= high] or [_number(schema, found[1])]
    if step is None and schema["type"] == "number" and (low % 1 or high % 1):
        raise AccelError(f"{name}: {item!r} needs a step, as in {item}:0.05")
    step = Decimal(1) if step is None else step
    if high < low or step <= 0:
        raise AccelError(f"{name}: {item!r} has no values: write the lower end first, and a step above 0")
    if (high - low) / step >= MAX_CELLS:
        raise _too_many(f"{name}: {item!r} has more than {MAX_CELLS} values")
    return [_number(schema, str(low + i * step)) for i in range(int((high - low) / step) + 1)]


def _number(schema: dict, text: str) -> int | float | str:
    """A number as its field takes it; other text is returned unchanged, for `_check` to refuse."""
    if not re.fullmatch(NUMBER, text):
        return text
    return int(text) if schema["type"] == "integer" and "." not in text else float(text)


def _check(name: str, value: Any) -> None:
    """Raise AccelError naming what is allowed if an axis does not take a value."""
    if name == "preset":
        if value not in (*preset_names(), NO_PRESET):
            raise AccelError(f"preset = {value!r} is not allowed: {axis_range(name)}")
    elif name in RUN_AXES:
        build_run(ModelDefaults(), **{"model": "-", "prompt": "-", name: value})
    else:
        method, _, parameter = name.partition(".")
        build_methods({method: {parameter: value}})


def _too_many(what: str) -> AccelError:
    return AccelError(f"{what}, at most {MAX_CELLS} are allowed: give fewer values")


def _listing(values: Sequence) -> str:
    return ", ".join(map(value_text, values))
