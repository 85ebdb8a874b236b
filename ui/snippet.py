"""The accelerated side of a pair as Python: what one takes into one's own code."""

from __future__ import annotations

from typing import Any

from accel.methods import METHODS
from accel.runtime.models import Home, own_home


def code(run: dict[str, Any]) -> str:
    """Code that makes the video of a `Run` (its fields; others are ignored), from the same noise."""
    call = {"num_inference_steps": run["steps"], "guidance_scale": run["guidance"], "height": run["height"],
            "width": run["width"], "num_frames": run["frames"]}  # fmt: skip
    home = own_home(run["model"])
    if home and home.text_length != Home().text_length:
        call["max_sequence_length"] = home.text_length
    given = "".join(f"        {name}={value!r},\n" for name, value in call.items())
    methods = "".join(f"    {_method(name, knobs)},\n" for name, knobs in run["methods"].items())
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


def _method(name: str, knobs: dict[str, Any]) -> str:
    """A method with the knobs that differ from its defaults."""
    fields = METHODS[name].model_fields
    changed = {k: v for k, v in knobs.items() if v != fields[k].get_default(call_default_factory=True)}
    return f"accel.METHODS[{name!r}]({', '.join(f'{knob}={value!r}' for knob, value in changed.items())})"
