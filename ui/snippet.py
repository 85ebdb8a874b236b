"""The accelerated side of a pair as Python: what one takes into one's own code."""

from __future__ import annotations

from typing import Any

from accel.methods import METHODS
from accel.runtime.models import ModelDefaults, read_defaults


def snippet(run: dict[str, Any]) -> str:
    """Code that makes the video of a `Run` (its fields; others are ignored), from the same noise."""
    call = {"num_inference_steps": run["steps"], "guidance_scale": run["guidance"], "height": run["height"],
            "width": run["width"], "num_frames": run["frames"]}  # fmt: skip
    defaults = read_defaults(run["model"])
    if defaults and defaults.text_length != ModelDefaults().text_length:
        call["max_sequence_length"] = defaults.text_length
    given = "".join(f"        {name}={value!r},\n" for name, value in call.items())
    methods = "".join(f"    {_method(name, parameters)},\n" for name, parameters in run["methods"].items())
    return (
        "import accel\nimport torch\n\n"
        f"pipe = accel.load_pipeline({run['model']!r})  # or a stock diffusers pipeline of your own\n"
        f"methods = [\n{methods}]\n"
        "with accel.apply(pipe, methods) as trace:\n"
        f"    video = pipe(\n        {run['prompt']!r},\n{given}"
        f"        generator=torch.Generator().manual_seed({run['seed']}),\n"
        "    ).frames[0]\n"
        "print(trace.summary())\n"
    )


def _method(name: str, parameters: dict[str, Any]) -> str:
    """A method with the knobs that differ from its defaults."""
    fields = METHODS[name].model_fields
    changed = {k: v for k, v in parameters.items() if v != fields[k].get_default(call_default_factory=True)}
    return f"accel.METHODS[{name!r}]({', '.join(f'{knob}={value!r}' for knob, value in changed.items())})"
