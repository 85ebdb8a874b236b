"""Acceleration methods for video diffusion transformers, on stock diffusers pipelines.

with accel.apply(pipe, accel.load_preset("fastercache")) as trace:
    video = pipe(prompt, num_inference_steps=50).frames[0]
print(trace.summary())
"""

from .apply import apply
from .methods import METHODS
from .models import load_pipeline
from .presets import Preset, load_preset
from .run import Run, compare, generate

__all__ = ["METHODS", "Preset", "Run", "apply", "compare", "generate", "load_pipeline", "load_preset"]
