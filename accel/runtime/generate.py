"""A run: everything that determines a video; and generating it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, Field, ValidationError, field_validator

from ..core.apply import apply
from ..core.host import synchronized_time
from ..core.trace import Trace
from ..families import family_of
from ..methods import METHODS
from ..methods.base import RunSpec
from .models import ModelDefaults, resolve
from .presets import build_methods, explain, required_settings
from .video import warm_encoder

LONGEST_PROMPT = 2000


class Run(BaseModel, frozen=True, extra="forbid"):
    """One generation, by value. `methods` are {name: {knob: value}}, inner to outer."""

    model: str
    prompt: str
    seed: int = Field(0, ge=0, le=2**63 - 1)
    height: int = Field(ge=16, le=2160)
    width: int = Field(ge=16, le=3840)
    frames: int = Field(ge=1, le=1025)
    steps: int = Field(ge=1, le=1000)
    guidance: float = Field(ge=0, le=30)
    methods: dict[str, dict] = {}

    @field_validator("prompt")
    @classmethod
    def _not_empty(cls, prompt: str) -> str:
        if not prompt.strip():
            raise ValueError("the prompt is empty")
        if len(prompt) > LONGEST_PROMPT:
            raise ValueError(f"the prompt has {len(prompt)} characters, at most {LONGEST_PROMPT} are allowed")
        return prompt.strip()


def build_run(defaults: ModelDefaults, **settings) -> Run:
    """A checked run; what is not given (or None) is what its methods demand, or the model's own.

    Raises ValueError in one sentence.
    """
    given = {k: v for k, v in settings.items() if v is not None}
    needed = required_settings(given.get("methods", {}))
    for key, value in needed.items():
        if given.get(key, value) != value:
            names = " + ".join(given["methods"])
            parameters = [f"{name}.{key}" for name in given["methods"] if key in METHODS[name].model_fields]
            hint = f"; set {' or '.join(parameters)} instead" if parameters else ""
            raise ValueError(f"{key} = {given[key]} is not possible with {names}: it makes {key} = {value:g}{hint}")
    own = {k: getattr(defaults, k) for k in ("height", "width", "frames", "steps", "guidance")} | needed
    try:
        run = Run(**{**own, **given})
    except ValidationError as error:
        first = error.errors()[0]
        if first["type"] == "value_error":
            raise ValueError(str(first["ctx"]["error"])) from None
        raise ValueError(explain(error, Run)) from None
    return run


def check_size(pipe, run: Run) -> None:
    """Raise ValueError if the model cannot make this size."""
    space = pipe.vae_scale_factor_spatial * pipe.transformer.config.patch_size[-1]
    time_step = pipe.vae_scale_factor_temporal
    for name, value in (("height", run.height), ("width", run.width)):
        if value % space:
            raise ValueError(f"{name} = {value} is not possible: it must be a multiple of {space}")
    if (run.frames - 1) % time_step:
        raise ValueError(f"frames = {run.frames} is not possible: it must be 1 more than a multiple of {time_step}")


def latent_spec(run: Run, pipe) -> torch.Tensor:
    """Latents (1, c, f, h, w) of a run, on the meta device: a shape and a dtype."""
    model, space = pipe.transformer, pipe.vae_scale_factor_spatial
    frames = (run.frames - 1) // pipe.vae_scale_factor_temporal + 1
    shape = (1, model.config.in_channels, frames, run.height // space, run.width // space)
    return torch.empty(shape, device="meta", dtype=model.dtype)


def grid(pipe, run: Run) -> tuple[int, int, int]:
    """Tokens (f, h, w) of a run."""
    return family_of(pipe).grid(pipe.transformer, latent_spec(run, pipe))


def _ahead(run: Run, pipe) -> RunSpec:
    family, model = family_of(pipe), pipe.transformer
    sites = len(family.attentions(model))
    return RunSpec(model, family, latent_spec(run, pipe), run.steps, run.guidance > 1, sites, resolve(run.model))


def estimate_memory(run: Run, pipe) -> int:
    """Bytes that the methods will hold at most during a run, known before it starts."""
    spec = _ahead(run, pipe)
    return sum(method.estimate_memory(spec) for method in build_methods(run.methods))


def preflight(run: Run, pipe) -> list[str]:
    """What can be said of a run before it starts: what its methods will hold, and which cannot save anything."""
    spec = _ahead(run, pipe)
    inactive_reason = (method.inactive_reason(spec) for method in build_methods(run.methods))
    return [f"The methods will hold up to {estimate_memory(run, pipe) / 2**20:.1f} MiB", *filter(None, inactive_reason)]


def environment(pipe) -> dict:
    """Where a pipeline runs: device, threads, dtype."""
    model = pipe.transformer  # whose dtype is not that of the layers which stay in float32
    device = torch.cuda.get_device_name() if model.device.type == "cuda" else "cpu"
    return {"device": device, "threads": torch.get_num_threads(), "dtype": str(model.dtype).removeprefix("torch.")}


@dataclass
class Video:
    """What a run gave: frames uint8 (f, h, w, c), the latents (1, c, f, h, w), seconds per stage, and the trace."""

    frames: np.ndarray
    latents: torch.Tensor
    seconds: dict[str, float]
    trace: Trace


class Cancelled(Exception):
    """Raised from a step callback to stop a run."""


def generate(
    run: Run, pipe, defaults: ModelDefaults, on_step: Callable[[int, Trace, torch.Tensor], None] | None = None
) -> Video:
    """The video of a run. `on_step(steps done, trace, latents)` is called after each step, outside the timing."""
    check_size(pipe, run)
    device = next(pipe.transformer.parameters()).device
    paused, denoised, final = 0.0, 0.0, torch.empty(0)

    def step_end(_, index: int, t, tensors: dict[str, Any]) -> dict:
        nonlocal paused, denoised, final
        now = synchronized_time(device)
        if index + 1 == pipe.num_timesteps:
            denoised, final = now - paused, tensors["latents"]
        if on_step:
            on_step(index + 1, trace, tensors["latents"])
        paused += synchronized_time(device) - now
        return {}

    asked = synchronized_time(device)
    with apply(pipe, build_methods(run.methods)) as trace:
        began = synchronized_time(device)
        out = pipe(
            prompt=run.prompt, height=run.height, width=run.width, num_frames=run.frames,
            num_inference_steps=run.steps, guidance_scale=run.guidance, max_sequence_length=defaults.text_length,
            generator=torch.Generator("cpu").manual_seed(run.seed), output_type="np", callback_on_step_end=step_end,
        )  # fmt: skip
        ended = synchronized_time(device) - paused
    frames = (np.asarray(out.frames[0]) * 255).round().astype(np.uint8)
    stages = {"text": trace.started - began, "denoise": denoised - trace.started, "decode": ended - denoised}
    if run.methods:
        stages = {"load": began - asked, **stages}  # of what was trained, mostly
    return Video(frames, final, stages, trace)


def warm_up(
    run: Run, pipe, defaults: ModelDefaults, on_step: Callable[[int, Trace, torch.Tensor], None] | None = None
) -> None:
    """Two steps whose time nobody counts, and the encoder's first start."""
    generate(run.model_copy(update={"steps": 2, "methods": {}}), pipe, defaults, on_step)
    warm_encoder()
