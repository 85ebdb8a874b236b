"""The options that commands share, and what becomes of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import typer
import yaml

from ..errors import AccelError
from ..runtime.presets import (
    DEFAULT_PRESET,
    RUN_SETTINGS,
    Preset,
    build_methods,
    load_preset,
    required_settings,
    with_parameter,
)

Prompt = Annotated[str, typer.Option(help="What to generate; tiny-wan knows examples/prompts/toy.txt.")]
Seed = Annotated[int, typer.Option(help="Seed of the initial noise.")]
PresetName = Annotated[
    str,
    typer.Option("--preset", help="A name in presets/, a YAML file or none; default: none with --set, else stepcache."),
]
Sets = Annotated[list[str], typer.Option("--set", help="Change a parameter: fastercache.attention_interval=3; repeat.")]
Steps = Annotated[int, typer.Option(help="Denoising steps; default: a given preset's, else the model's.")]
Guidance = Annotated[float, typer.Option(help="Guidance scale; default: a given preset's, else the model's.")]
SolverName = Annotated[str, typer.Option("--solver", help="default (the model's), unipc, euler, dpm++2m or dpm++2s.")]
Shift = Annotated[float, typer.Option(help="Flow shift; default: a given preset's, else the model's.")]
Model = Annotated[str, typer.Option(help="Folder or Hugging Face id of a diffusers pipeline.")]
Size = Annotated[int, typer.Option(min=1, help="In pixels; default: the model's.")]
Frames = Annotated[int, typer.Option(min=1, help="Number of frames; default: the model's.")]
Out = Annotated[Path, typer.Option(help="Folder for the results; made if missing.")]
INTERRUPTED = 130  # exit code after Ctrl-C


def parse_settings(preset: str | None, changes: list[str] | None, axes: Sequence[str] = ()) -> dict:
    """Methods and run settings of a preset, with the `--set` changes applied and checked.

    Without a preset it is the default one, but none where `changes` or the names of `axes` say which methods run.
    """
    named = {text.partition(".")[0] for text in (*(changes or ()), *axes) if "." in text.partition("=")[0]}
    preset = preset or ("none" if named - {DEFAULT_PRESET} or "preset" in axes else DEFAULT_PRESET)
    loaded = load_preset(preset) if preset != "none" else Preset()
    methods = dict(loaded.methods)
    for change in changes or []:
        target, _, value = change.partition("=")
        name, _, parameter = target.partition(".")
        if not (parameter and value):
            raise AccelError(f"--set {change!r} is not understood: write method.parameter=value")
        try:
            parsed = yaml.safe_load(value)
        except (yaml.YAMLError, ValueError):  # such as a day that no month has
            raise AccelError(f"--set {change!r} is not understood: put the value into quotes") from None
        if loaded.methods:
            methods = with_parameter(methods, name, parameter, parsed)
        else:  # the order in which they are written
            methods.setdefault(name, {})[parameter] = parsed
    build_methods(methods)
    return {"methods": methods, **loaded.model_dump(include=set(RUN_SETTINGS))}


def pair_maker(
    settings: dict, steps: int | None, guidance: float | None, common: dict, *, separate: bool,
    solver: str | None = None, shift: float | None = None,
) -> Callable:  # fmt: skip
    """A function of the defaults that returns the runs a (baseline) and b (with the methods of `settings`).

    `separate`: settings that the methods of b decide, as those of a student do, apply to a alone.
    """
    from ..runtime.run import build_run

    required = required_settings(settings["methods"]) if separate else {}
    given = dict(zip(RUN_SETTINGS, (steps, guidance, solver, shift)))
    of_b = {key: settings[key] if value is None else value for key, value in given.items() if key not in required}
    return lambda defaults: (
        build_run(defaults, **common, **given),
        build_run(defaults, **common, methods=settings["methods"], **of_b),
    )


def load_for(model: str, make_runs: Callable) -> tuple:
    """Pipeline, defaults and runs `make_runs(defaults)` of a model.

    Raises AccelError before the model is loaded where its files tell that a run is not possible.
    """
    from ..runtime.models import ModelDefaults, check_model, load_pipeline, model_defaults, read_defaults
    from ..runtime.run import check_size, check_size_from_files

    check_model(model)
    defaults = read_defaults(model)
    for run in make_runs(defaults or ModelDefaults()):  # wrong settings are refused before a model is downloaded
        if defaults:
            check_size_from_files(run)
    pipe = load_pipeline(model)
    defaults = defaults or model_defaults(pipe, model)
    for run in (runs := make_runs(defaults)):
        check_size(run, pipe)
    return pipe, defaults, runs


def first_example(model: str) -> str:
    """The first of a model's example prompts."""
    from ..runtime.example_prompts import example_prompts
    from ..runtime.models import read_defaults

    return example_prompts(read_defaults(model))[0]


def print_messages(messages: list[str], printed: list[str]) -> None:
    """What the methods reported in a run, without what was printed before it."""
    for message in messages:
        if message not in printed:
            print(message)


def print_json(document: dict) -> None:
    """The last line of a command's output."""
    print(json.dumps(document))
