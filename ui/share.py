"""Settings from outside: links `?p=...` and `?preset=NAME&seed=42`, and preset files. Nothing in them is trusted.

Everything is checked by the models of presets and runs. Methods take only the parameters that the page shows, so no
text from outside becomes a path.
"""

from __future__ import annotations

import base64
import binascii
import difflib
import json
import re
import zlib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlencode

import yaml

from accel.errors import AccelError
from accel.methods import METHODS
from accel.runtime.models import TINY, ModelDefaults, read_defaults
from accel.runtime.presets import (
    OWN_NOISE_LEVELS,
    RUN_SETTINGS,
    Preset,
    build_methods,
    checked,
    load_preset,
    normalize_methods,
    preset_names,
)
from accel.runtime.repeat import changed_methods, preset_of, reference_of
from accel.runtime.run import parse_run

MAX_LINK = 12 * 1024  # characters of `p`; the longest prompt in any script takes less
MAX_READABLE = 1000  # characters of a link that spells its settings out
MAX_TEXT = 16 * 1024  # bytes of a preset file, or of what a link holds
MAX_MESSAGE = 300  # characters
RUN = ("prompt", "seed", *RUN_SETTINGS)  # what a link can say of the candidate beside its methods
LINK = ("preset", "methods", "model", "reference", *RUN)
PARAMETERS = ("p", *LINK)  # of a page's address: p holds all of them
NOT_OURS = ("owner", "deep_link", "logs", "view")  # query parameters that others read


@dataclass(frozen=True)
class SharedSettings:
    """Checked settings: the candidate's methods, and of its run what was given; `model` is None if not given.

    `run` may hold "reference", the settings of the reference: steps, guidance, solver, shift and methods.
    """

    preset: Preset
    run: dict[str, Any] = field(default_factory=dict)
    model: str | None = None


def link_parameter(report: dict) -> str:
    """The `?p=` of a pair: its settings as compact text for a URL."""
    reference = reference_of(report)
    values = {**_given(report, RUN), "model": report["model"], "methods": changed_methods(report["methods"])}
    values["reference"] = {**_given(reference, RUN_SETTINGS), "methods": changed_methods(reference["methods"])}
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    data = packer.compress(json.dumps(values, separators=(",", ":"), ensure_ascii=False).encode()) + packer.flush()
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def link_query(report: dict) -> str:
    """The query that restores a pair's settings: readable where names and numbers say all, else `p=`."""
    name, reference = preset_of(report["methods"]), reference_of(report)
    stock = {**OWN_NOISE_LEVELS, **(read_defaults(report["model"]) or ModelDefaults()).model_dump(), "methods": {}}
    plain = all(reference.get(key, stock[key]) == stock[key] for key in (*RUN_SETTINGS, "methods"))
    if name and plain and report["model"] == TINY:
        readable = urlencode({"preset": name, "model": TINY, **_given(report, RUN)})
        if len(readable) <= MAX_READABLE:
            return readable
    return f"p={link_parameter(report)}"


def holds_settings(query: Iterable[str]) -> bool:
    """Whether the names of a page's query parameters are those of a link with settings."""
    return any(name in PARAMETERS for name in query)


def shared_parameters(query: Mapping[str, str]) -> dict[str, str]:
    """Those of a page's query parameters that hold settings."""
    return {key: value for key, value in query.items() if key in PARAMETERS}


def read_link(query: Mapping[str, str], models: Mapping[str, str]) -> SharedSettings | None:
    """The settings of a page's query parameters; None if it has none.

    `models` are those that the page offers, each with the reason why it cannot run here, or an empty text.

    Raises AccelError in one sentence.
    """
    given = shared_parameters(query)
    refuse_misspelt(key for key in query if key not in given and key not in NOT_OURS)
    if not given:
        return None
    if "p" in given:
        if len(given) > 1:
            raise AccelError("the link has p and other settings: p alone holds them all")
        given = _unpack(given["p"])
    elif unreadable := {"methods", "reference"} & given.keys():
        raise AccelError(f"{unreadable.pop()} cannot be written out in a link: only p holds it")
    else:
        given = {key: _typed(key, value) for key, value in given.items()}
    return check_settings(given, models)


def refuse_misspelt(keys: Iterable[str]) -> None:
    """Raise AccelError for a query parameter that looks like one of ours; others were added to the link on its way."""
    for key in keys:
        if close := difflib.get_close_matches(key[:40], LINK, 1, cutoff=0.75):
            raise AccelError(f"unknown setting {key[:40]!r} in the link: did you mean {close[0]}?")


def check_settings(given: dict[str, Any], models: Mapping[str, str]) -> SharedSettings:
    """Checked settings from untrusted values. Raises AccelError in one sentence that says what is allowed."""
    if unknown := [key for key in given if key not in LINK]:
        raise AccelError(_short(f"unknown setting {unknown[0]!r} in the link; known are p, {', '.join(LINK)}"))
    if "preset" in given and "methods" in given:
        raise AccelError("the link has a preset and methods: one of them says which methods run")
    model = given.get("model")
    if model is not None and model not in list(models):  # it may be of any type
        raise AccelError(_short(f"this page does not offer the model {model!r}; it offers {', '.join(models)}"))
    if model is not None and models[model]:
        raise AccelError(models[model])
    if "preset" in given and given["preset"] not in preset_names():
        raise AccelError(_short(f"no preset {given['preset']!r}; there are {', '.join(preset_names())}"))
    preset = load_preset(given["preset"]) if "preset" in given else _preset({"methods": given.get("methods", {})})
    run = _run({key: given[key] for key in RUN if key in given})
    if "reference" in given:
        run["reference"] = _side(given["reference"])
    return SharedSettings(preset, run, model)


def read_preset(text: str | bytes) -> Preset:
    """The preset in the text of a YAML file. Raises AccelError in one sentence that says what is wrong with it."""
    data = text.encode(errors="surrogatepass") if isinstance(text, str) else text
    if len(data) > MAX_TEXT:
        raise AccelError(f"the preset has {len(data)} bytes, at most {MAX_TEXT} are allowed")
    try:
        values = yaml.load(data.decode(), _Loader)  # a SafeLoader: it makes plain values only
    except UnicodeDecodeError:
        raise AccelError("the preset is not a text in UTF-8") from None
    except RecursionError:
        raise AccelError("the preset is nested too deeply") from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        raise AccelError(_short(f"the preset is not valid YAML: {' '.join(str(error).split())}")) from None
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise AccelError(f"a preset is a mapping; its keys are {', '.join(Preset.model_fields)}")
    return _preset(values)


class _Loader(yaml.SafeLoader):
    """Refuses aliases: a few of them, nested, stand for billions of values."""

    def compose_node(self, parent, index):
        if self.check_event(yaml.events.AliasEvent):
            raise yaml.YAMLError("aliases (*name) are not allowed")
        return super().compose_node(parent, index)


def _unpack(text: str) -> dict[str, Any]:
    """What a `?p=` holds. It is inflated up to a limit, so a small text cannot fill the memory."""
    damaged = AccelError("the link is damaged: its settings cannot be read")
    if len(text) > MAX_LINK:
        raise AccelError(f"the link has {len(text)} characters of settings, at most {MAX_LINK} are allowed")
    try:
        unpacker = zlib.decompressobj(-15)
        data = unpacker.decompress(base64.b64decode(text + "=" * (-len(text) % 4), "-_", validate=True), MAX_TEXT)
        if unpacker.unconsumed_tail or not unpacker.eof:
            raise damaged
        values = json.loads(data, parse_constant=_refuse_constant)
    except (binascii.Error, zlib.error, ValueError, RecursionError):
        raise damaged from None
    if not isinstance(values, dict):
        raise damaged
    return values


def _given(run: dict, keys: Collection[str]) -> dict[str, Any]:
    """Those settings of a run that are not the model's own."""
    return {key: run[key] for key in keys if run.get(key) not in (None, OWN_NOISE_LEVELS.get(key))}


def _refuse_constant(name: str):
    raise ValueError(f"{name} is not JSON")


def _preset(values: dict[str, Any]) -> Preset:
    try:
        preset = checked(Preset, values)
        methods = normalize_methods(preset.methods)
        refuse_hidden(methods)
        build_methods(methods)
    except ValueError as error:  # a method's own check may raise one
        raise AccelError(_short(str(error))) from None
    return preset.model_copy(update={"methods": methods})


def refuse_hidden(methods: dict[str, dict]) -> None:
    """Raise AccelError for a parameter that the page does not show; most of them are paths."""
    for name, parameters in methods.items():
        fields = METHODS[name].model_fields.keys() - METHODS[name].parameters().keys() if name in METHODS else ()
        if hidden := [key for key in parameters if key in fields]:
            raise AccelError(f"{name}.{hidden[0]} is for Python and the command line only, not for the page")


def _run(given: dict[str, Any]) -> dict[str, Any]:
    """The given settings of a run, checked as those of a run are."""
    try:
        run = parse_run(ModelDefaults(), {"model": TINY, "prompt": "any", **given})
    except AccelError as error:
        raise AccelError(_short(str(error))) from None
    return {key: getattr(run, key) for key in given}


def _typed(key: str, text: str) -> Any:
    """A value of a readable link: a number where one is meant, and the text where it is none."""
    if key in ("seed", "steps") and re.fullmatch(r"-?\d{1,20}", text):
        return int(text)
    return float(text) if key in ("guidance", "shift") and re.fullmatch(r"-?\d{1,9}(\.\d{1,9})?", text) else text


def _side(given: Any) -> dict[str, Any]:
    """The settings of the reference."""
    allowed = (*RUN_SETTINGS, "methods")
    if not isinstance(given, dict) or any(key not in allowed for key in given):
        raise AccelError(f"the reference of the link is not understood; it may hold {', '.join(allowed)}")
    methods = _preset({"methods": given.get("methods", {})}).methods
    return {**_run({key: value for key, value in given.items() if key != "methods"}), "methods": methods}


def _short(text: str) -> str:
    return text if len(text) <= MAX_MESSAGE else text[: MAX_MESSAGE - 1] + "…"
