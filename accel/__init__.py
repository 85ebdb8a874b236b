"""Acceleration methods for video diffusion transformers, on stock diffusers pipelines.

with accel.apply(pipe, accel.load_preset("fastercache")) as trace:
    video = pipe(prompt, num_inference_steps=50).frames[0]
print(trace.summary())
"""

from .core.apply import apply
from .evaluation.compare import compare
from .methods import METHODS
from .runtime.generate import Run, generate
from .runtime.models import load_pipeline
from .runtime.presets import Preset, load_preset

__all__ = ["METHODS", "Preset", "Run", "apply", "compare", "generate", "load_pipeline", "load_preset"]
