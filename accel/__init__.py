"""Acceleration methods for video diffusion transformers, on stock diffusers pipelines.

with accel.apply(pipe, "stepcache") as trace:
    video = pipe(prompt, num_inference_steps=50).frames[0]
print(trace.summary())

`generate(run, pipe, defaults)` and `compare(a, b, pipe, defaults)` make and measure videos of a `Run`, which
`accel.runtime.run.build_run` builds from `defaults = accel.runtime.models.model_defaults(pipe, model)`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .evaluation.compare import compare
    from .methods import METHODS
    from .runtime.apply import apply
    from .runtime.generate import generate
    from .runtime.models import load_pipeline
    from .runtime.presets import Preset, load_preset
    from .runtime.run import Run

__all__ = ["METHODS", "Preset", "Run", "apply", "compare", "generate", "load_pipeline", "load_preset"]

_MODULES = {
    "METHODS": "methods",
    "Preset": "runtime.presets",
    "Run": "runtime.run",
    "apply": "runtime.apply",
    "compare": "evaluation.compare",
    "generate": "runtime.generate",
    "load_pipeline": "runtime.models",
    "load_preset": "runtime.presets",
}


def __getattr__(name: str) -> Any:
    """Import a name when it is first used, as importing torch and diffusers takes seconds."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_MODULES[name]}", __name__), name)
    globals()[name] = value
    return value
