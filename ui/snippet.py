"""The accelerated run of a pair as Python code that a reader can take home."""

from __future__ import annotations

from typing import Any

from accel.methods import METHODS
from accel.runtime.models import ModelDefaults, read_defaults


def snippet(run: dict[str, Any]) -> str:
    """Code that generates the video of a `Run` from the same noise; of a report it uses the run's fields alone."""
    arguments = {"num_inference_steps": run["steps"], "guidance_scale": run["guidance"], "height": run["height"],
                 "width": run["width"], "num_frames": run["frames"]}  # fmt: skip
    defaults = read_defaults(run["model"])
    if defaults and defaults.text_length != ModelDefaults().text_length:
        arguments["max_sequence_length"] = defaults.text_length
    call = "".join(f"        {name}={value!r},\n" for name, value in arguments.items())
    methods = "".join(f"    {_method(name, parameters)},\n" for name, parameters in run["methods"].items())
    return (
        "import accel\nimport torch\n\n"
        f"pipe = accel.load_pipeline({run['model']!r})  # or a stock diffusers pipeline of your own\n"
        f"methods = [\n{methods}]\n"
        "with accel.apply(pipe, methods) as trace:\n"
        f"    video = pipe(\n        {run['prompt']!r},\n{call}"
        f"        generator=torch.Generator().manual_seed({run['seed']}),\n"
        "    ).frames[0]\n"
        "print(trace.summary())\n"
    )


def _method(name: str, parameters: dict[str, Any]) -> str:
    """A method with the parameters that differ from its defaults."""
    fields = METHODS[name].model_fields
    changed = {k: v for k, v in parameters.items() if v != fields[k].get_default(call_default_factory=True)}
    return f"accel.METHODS[{name!r}]({', '.join(f'{name}={value!r}' for name, value in changed.items())})"
