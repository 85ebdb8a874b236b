"""A run as text that repeats it elsewhere: Python code, a command line, and a preset file.

All functions take a `Run` as a dict, or the report of a pair, which holds the candidate's fields.
"""

from __future__ import annotations

import json
import shlex
from typing import Any

import yaml

from ..errors import AccelError
from ..methods import METHODS
from .models import TINY, ModelDefaults, read_defaults
from .presets import OWN_NOISE_LEVELS, RUN_SETTINGS, load_preset, preset_names, required_settings


def python_code(run: dict[str, Any]) -> str:
    """Code that generates the video of a run from the same noise."""
    arguments = {"num_inference_steps": run["steps"], "guidance_scale": run["guidance"], "height": run["height"],
                 "width": run["width"], "num_frames": run["frames"]}  # fmt: skip
    defaults = read_defaults(run["model"])
    if defaults and defaults.text_length != ModelDefaults().text_length:
        arguments["max_sequence_length"] = defaults.text_length
    call = "".join(f"        {name}={value!r},\n" for name, value in arguments.items())
    methods = "".join(f"    {_method(name, parameters)},\n" for name, parameters in run["methods"].items())
    imports, scheduler = _scheduler(run)
    return (
        f"{imports}import accel\nimport torch\n\n"
        f"pipe = accel.load_pipeline({run['model']!r})  # or a stock diffusers pipeline of your own\n{scheduler}"
        f"methods = [\n{methods}]\n"
        "with accel.apply(pipe, methods) as trace:\n"
        f"    video = pipe(\n        {run['prompt']!r},\n{call}"
        f"        generator=torch.Generator().manual_seed({run['seed']}),\n"
        "    ).frames[0]\n"
        "print(trace.summary())\n"
    )


def _scheduler(run: dict[str, Any]) -> tuple[str, str]:
    """The lines of code that import what sets the solver of a run, and that set it; empty for the model's own."""
    values = {key: run.get(key, value) for key, value in OWN_NOISE_LEVELS.items()}
    if values == OWN_NOISE_LEVELS:
        return "", ""
    given = ", ".join(f"{key}={value!r}" for key, value in {**values, "steps": run["steps"]}.items())
    imports = "from types import SimpleNamespace\n\nfrom accel.runtime.solvers import build_scheduler\n"
    return imports, f"pipe.scheduler = build_scheduler(SimpleNamespace({given}), pipe.scheduler)\n"


def command(report: dict[str, Any]) -> str:
    """A command line, quoted for the shell, that generates both videos of a pair again.

    One `compare` where its options can say both runs; else one `run` for each video.
    """
    reference = reference_of(report)
    if _one_command(reference, report):
        return f"python -m accel compare {_options(reference, report['methods'])}"
    runs = {"a": _options(reference, reference["methods"]), "b": _options(report, report["methods"])}
    return "\n".join(f"python -m accel run {options} --out runs/{side}" for side, options in runs.items())


def reference_of(report: dict[str, Any]) -> dict[str, Any]:
    """The run of a pair's reference. A report without one was made when references had no methods of their own."""
    shared = {key: report[key] for key in ("model", "prompt", "seed", "height", "width", "frames")}
    if "reference" in report:
        return {**shared, **report["reference"]}
    return {**shared, **OWN_NOISE_LEVELS, "steps": report["steps_a"], "guidance": report["guidance_a"], "methods": {}}


def check_repeatable(report: dict[str, Any]) -> None:
    """Raise AccelError for a pair of an earlier version, with methods, parameters or a combination not there today."""
    for run in (report, reference_of(report)):
        try:
            required_settings(run["methods"])
        except AccelError:
            raise AccelError("this result is of an earlier version: it can be watched, but not repeated") from None


def preset_yaml(run: dict[str, Any]) -> str:
    """The methods of a run, and the settings that they do not bring themselves, as a preset file.

    Its first lines are comments with what a preset does not hold: model, prompt and seed.
    """
    notes = [f"# {key}: {json.dumps(run[key])}" for key in ("model", "prompt", "seed")]
    required = required_settings(run["methods"])
    fields = [key for key in RUN_SETTINGS if key not in required]
    values = {key: run[key] for key in fields if run.get(key) not in (None, OWN_NOISE_LEVELS.get(key))}
    preset = {**values, "methods": changed_methods(run["methods"])}
    return "\n".join(notes) + "\n" + yaml.safe_dump(preset, sort_keys=False, allow_unicode=True)


def changed_methods(methods: dict[str, dict]) -> dict[str, dict]:
    """The methods, each with the parameters that differ from its defaults."""
    return {name: _changed(name, parameters) for name, parameters in methods.items()}


def preset_of(methods: dict[str, dict]) -> str | None:
    """The name of the shipped preset that has exactly these methods and parameters, in any order."""
    wanted = changed_methods(methods)
    return next((name for name in preset_names() if changed_methods(load_preset(name).methods) == wanted), None)


def _changed(name: str, parameters: dict[str, Any]) -> dict[str, Any]:
    fields = METHODS[name].model_fields
    return {k: v for k, v in parameters.items() if v != fields[k].get_default(call_default_factory=True)}


def _method(name: str, parameters: dict[str, Any]) -> str:
    values = _changed(name, parameters)
    return f"accel.METHODS[{name!r}]({', '.join(f'{name}={value!r}' for name, value in values.items())})"


def _one_command(reference: dict[str, Any], candidate: dict[str, Any]) -> bool:
    """Whether `compare` can say both runs: its options apply to both, but for what the candidate's methods decide."""
    required = required_settings(candidate["methods"])
    values = lambda run: {**OWN_NOISE_LEVELS, **{k: run[k] for k in RUN_SETTINGS if k in run}}
    a, b = values(reference), values(candidate)
    return not reference["methods"] and all(key in required or a[key] == b[key] for key in a)


def _options(run: dict[str, Any], methods: dict[str, dict]) -> str:
    """The options of `run` and `compare` for a run with some methods."""
    defaults = read_defaults(run["model"])
    values = {"prompt": run["prompt"], "seed": run["seed"], "steps": run["steps"], "guidance": run["guidance"]}
    values |= {k: run[k] for k in ("height", "width", "frames") if not defaults or run[k] != getattr(defaults, k)}
    values |= {key: run[key] for key, value in OWN_NOISE_LEVELS.items() if run.get(key, value) != value}
    values |= {"model": run["model"]} if run["model"] != TINY else {}
    words = [*(word for key, value in values.items() for word in _option(key, value)), *_method_options(methods)]
    return " ".join(shlex.quote(word) for word in words)


def _option(name: str, value: Any) -> list[str]:
    """An option with its value, in one word where the value begins with a dash."""
    return [f"--{name}={value}"] if str(value).startswith("-") else [f"--{name}", str(value)]


def _method_options(methods: dict[str, dict]) -> list[str]:
    if name := preset_of(methods) if methods else "none":
        return ["--preset", name]
    words = ["--preset", "none"]
    for name, parameters in methods.items():
        complete = METHODS[name](**parameters).model_dump()
        changed = _changed(name, parameters) or dict([next(iter(complete.items()))])  # one, to name the method
        for key, value in changed.items():
            words += ["--set", f"{name}.{key}={_yaml(value)}"]
    return words


def _yaml(value: Any) -> str:
    """A value in one line, as `--set` reads it."""
    return yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix("\n").removesuffix("\n...")
