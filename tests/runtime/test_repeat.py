"""Text that repeats a run: the command line parses back to the same runs, the preset file to the same methods."""

import shlex

import pytest
import typer.main
import yaml

from accel.cli import app, pair_maker, parse_settings
from accel.runtime.models import TINY, read_defaults
from accel.runtime.presets import build_methods, load_preset, preset_names
from accel.runtime.repeat import command, preset_of, preset_yaml, python_code
from accel.runtime.run import build_run

DEFAULTS = read_defaults(TINY)
HOSTILE = ['it\'s; rm -rf $HOME `id` "x"', "-x --out=/tmp", "two\nlines", "ünï \\ %s {} #"]


def report_of(a, b) -> dict:
    """The fields of a pair's report that say what was run."""
    return {**b.model_dump(), "steps_a": a.steps, "guidance_a": a.guidance}


def pair(methods: dict, prompt: str = "a red star", steps: int = 30, guidance: float = 3.5, seed: int = 7) -> dict:
    a = build_run(DEFAULTS, model=TINY, prompt=prompt, seed=seed, steps=steps, guidance=guidance)
    required = {name: None for name in ("steps", "guidance")} if {"gpd", "meanflow"} & methods.keys() else {}
    own = {"steps": steps, "guidance": guidance, **required}
    return report_of(a, build_run(DEFAULTS, model=TINY, prompt=prompt, seed=seed, methods=methods, **own))


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
    settings = parse_settings(p["preset"], p["set_"])
    return report_of(*pair_maker(settings, p["steps"], p["guidance"], common, separate=True)(DEFAULTS))


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
    reference = pair({"fastercache": {}})
    report = {
        **pair(load_preset("gpd").methods),
        "reference": {k: reference[k] for k in ("steps", "guidance", "methods")},
    }
    first, second = map(parsed, command(report).splitlines())
    assert first["set_"] == ["fastercache.attention=true"] and first["steps"] == 30
    assert (second["preset"], second["steps"], second["guidance"]) == ("gpd", 6, 1.0)


def test_methods_without_changed_parameters_keep_their_order():
    report = pair({"asymrnr": {}, "fastercache": {}})
    again = repeated(command(report))
    assert list(again["methods"]) == ["asymrnr", "fastercache"] and complete(again) == complete(report)


def test_a_pair_of_other_steps_is_repeated_by_two_runs():
    report = {**pair({}, steps=20), "steps_a": 50}
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
    if "gpd" not in again.methods and "meanflow" not in again.methods:
        assert (again.steps, again.guidance) == (30, 3.5)


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
