"""Text that repeats a run: the command line parses back to the same runs, the preset file to the same methods."""

import shlex
from copy import copy

import numpy as np
import pytest
import typer.main
import yaml

import accel
from accel.cli import app
from accel.cli.options import pair_maker, parse_settings
from accel.runtime.generate import generate
from accel.runtime.models import TINY, read_defaults
from accel.runtime.presets import build_methods, load_preset, preset_names, required_settings
from accel.runtime.repeat import command, preset_of, preset_yaml, python_code
from accel.runtime.run import Run, build_run

DEFAULTS = read_defaults(TINY)
HOSTILE = ['it\'s; rm -rf $HOME `id` "x"', "-x --out=/tmp", "two\nlines", "ünï \\ %s {} #"]


def report_of(a, b) -> dict:
    """The fields of a pair's report that say what was run."""
    return {**b.model_dump(), "reference": a.model_dump()}


def pair(methods: dict, prompt: str = "a red star", **settings) -> dict:
    """The report of a pair with one setting of both runs, but for what the methods decide: steps, guidance, solver."""
    common = {"model": TINY, "prompt": prompt, "seed": 7}
    given = {"steps": 30, "guidance": 3.5, **settings}
    required = required_settings(methods)
    decided = {*required, "solver", "shift"} if required else set()
    own = {key: value for key, value in given.items() if key not in decided}
    return report_of(build_run(DEFAULTS, **common, **given), build_run(DEFAULTS, **common, methods=methods, **own))


def parsed(line: str) -> dict:
    """The values of a command's parameters."""
    words = shlex.split(line)
    assert words[:3] == ["python", "-m", "accel"]
    sub = typer.main.get_command(app).commands[words[3]]
    return sub.make_context(words[3], words[4:]).params


def repeated(line: str) -> dict:
    """What `compare` would report for a command line."""
    p = parsed(line)
    common = {key: p[key] for key in ("model", "prompt", "seed", "height", "width", "frames")}
    settings, options = parse_settings(p["preset"], p["set_"]), {"solver": p["solver"], "shift": p["shift"]}
    return report_of(*pair_maker(settings, p["steps"], p["guidance"], common, separate=True, **options)(DEFAULTS))


def complete(report: dict) -> dict:
    """A report with every parameter of its methods."""
    methods = zip(report["methods"], build_methods(report["methods"]))
    return {**report, "methods": {name: method.model_dump() for name, method in methods}}


@pytest.mark.parametrize("name", preset_names())
def test_the_command_repeats_the_pair_of_every_preset(name):
    report = pair(load_preset(name).methods)
    assert f"--preset {name}" in command(report)
    assert complete(repeated(command(report))) == complete(report)


@pytest.mark.parametrize("prompt", HOSTILE)
def test_the_command_is_quoted_for_the_shell(prompt):
    report = pair({"fastercache": {"attention_interval": 3, "extrapolation": "linear"}}, prompt=prompt)
    assert complete(repeated(command(report))) == complete(report)


def test_a_pair_with_an_accelerated_reference_is_repeated_by_two_runs():
    report = {**pair(load_preset("gpd").methods), "reference": pair({"fastercache": {}})}
    first, second = map(parsed, command(report).splitlines())
    assert first["set_"] == ["fastercache.attention=true"] and first["steps"] == 30
    assert (second["preset"], second["steps"], second["guidance"]) == ("gpd", 6, 1.0)


@pytest.mark.parametrize("name", ["fastercache", "gpd"])
def test_solver_and_shift_are_repeated(name):
    report = pair(load_preset(name).methods, solver="dpm++2m", shift=3.5)
    assert "--solver dpm++2m --shift 3.5" in command(report)
    assert complete(repeated(command(report))) == complete(report)


def test_a_report_from_before_references_had_settings_is_repeated():
    report = pair({"fastercache": {}})
    old = {**report, "steps_a": 30, "guidance_a": 3.5}
    for key in ("reference", "solver", "shift"):
        del old[key]
    assert command(old) == command(report) and preset_yaml(old) == preset_yaml(report)
    assert python_code(old) == python_code(report)


@pytest.mark.parametrize(
    "settings", [{}, {"solver": "euler"}, {"solver": "dpm++2m", "shift": 5.0}, {"shift": 2.0}], ids=str
)
def test_the_code_makes_the_same_video(settings, tiny_wan, monkeypatch):
    monkeypatch.setattr(accel, "load_pipeline", lambda model: copy(tiny_wan))
    small = {"height": 48, "width": 48, "frames": 5, "steps": 4}
    report = pair({"fastercache": {"attention_interval": 3}}, "a 'red' star spins", **small, **settings)
    names: dict = {}
    exec(python_code(report), names)
    run = build_run(DEFAULTS, **{key: report[key] for key in Run.model_fields})
    same = generate(run, tiny_wan, DEFAULTS).frames
    np.testing.assert_array_equal((names["video"] * 255).round().astype(np.uint8), same)


def test_the_preset_of_methods_is_found_in_any_order():
    methods = load_preset("combined").methods
    assert preset_of(methods) == preset_of(dict(reversed(methods.items()))) == "combined"


def test_methods_without_changed_parameters_keep_their_order():
    report = pair({"asymrnr": {}, "fastercache": {}})
    again = repeated(command(report))
    assert list(again["methods"]) == ["asymrnr", "fastercache"] and complete(again) == complete(report)


def test_a_pair_of_other_steps_is_repeated_by_two_runs():
    report = {**pair({}, steps=20), "reference": pair({}, steps=50)["reference"]}
    first, second = command(report).splitlines()
    assert (parsed(first)["steps"], parsed(second)["steps"]) == (50, 20)
    assert parsed(first)["preset"] == parsed(second)["preset"] == "none"
    assert first.endswith("--out runs/a") and second.endswith("--out runs/b")


@pytest.mark.parametrize("name", preset_names())
def test_the_preset_file_has_the_same_methods(name, tmp_path):
    report = pair(load_preset(name).methods)
    file = tmp_path / "x.yaml"
    file.write_text(preset_yaml(report))
    again = load_preset(file)
    assert preset_of(again.methods) == name
    decided = required_settings(again.methods)
    assert again.steps == (None if "steps" in decided else 30)
    assert again.guidance == (None if "guidance" in decided else 3.5)


@pytest.mark.parametrize("prompt", HOSTILE)
def test_a_prompt_stays_a_comment_of_the_preset_file(prompt):
    assert set(yaml.safe_load(preset_yaml(pair({"fastercache": {}}, prompt=prompt)))) <= {
        "steps",
        "guidance",
        "methods",
    }


@pytest.mark.parametrize("prompt", HOSTILE)
def test_a_prompt_stays_a_text_in_the_code(prompt):
    code = python_code(pair({"fastercache": {}}, prompt=prompt))
    compile(code, "code", "exec")
    assert repr(prompt) in code
