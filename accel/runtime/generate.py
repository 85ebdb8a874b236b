"""Generates the video of a run, and says before what the run will cost."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from ..core.calls import synchronized_time
from ..core.trace import Trace
from ..errors import AccelError
from ..families import family_of
from ..methods.base import RunSpec
from .apply import apply
from .models import ModelDefaults, model_defaults, resolve
from .presets import build_methods
from .preview import Race
from .run import Run, check_size
from .solvers import solver_of
from .video import warm_encoder

NOT_FINITE = "the weights are damaged, or too large for the model's number format"
StepCallback = Callable[[int, Trace, torch.Tensor], None]  # steps done, trace, latents


def latent_spec(run: Run, pipe) -> torch.Tensor:
    """Latents (1, c, f, h, w) of a run on the meta device: a shape and a dtype."""
    family = family_of(pipe)
    model, (space, time) = family.denoiser(pipe), family.compression(pipe)
    shape = (1, family.in_channels(model), (run.frames - 1) // time + 1, run.height // space, run.width // space)
    return torch.empty(shape, device="meta", dtype=model.dtype)


def grid(pipe, run: Run) -> tuple[int, int, int]:
    """The grid (f, h, w) of a run's tokens."""
    family = family_of(pipe)
    patch = family.patch(family.denoiser(pipe))
    return tuple(-(-n // p) for n, p in zip(latent_spec(run, pipe).shape[2:], patch))


def planned_spec(run: Run, pipe) -> RunSpec:
    """What methods may know of a run before it starts."""
    family = family_of(pipe)
    model = family.denoiser(pipe)
    return RunSpec(
        model=model, family=family, latents=latent_spec(run, pipe), grid=grid(pipe, run), count=run.steps,
        guided=run.guidance > 1 and not family.embeds_guidance, num_layers=len(family.attentions(model)),
        text_tokens=model_defaults(pipe, run.model).text_length if family.is_joint else 0,
        model_path=resolve(run.model), guidance=run.guidance,
    )  # fmt: skip


def estimate_memory(run: Run, pipe) -> int:
    """Bytes that the methods will hold at most during a run."""
    spec = planned_spec(run, pipe)
    return sum(method.estimate_memory(spec) for method in build_methods(run.methods))


def preflight(run: Run, pipe) -> list[str]:
    """Sentences to show before a run: how much memory the methods will hold, and which of them cannot save anything.

    Raises AccelError for a run that the pipeline cannot make.
    """
    check_size(run, pipe)
    with solver_of(run, pipe):  # refuses here and not after a reference has been generated
        pass
    spec, held, methods = planned_spec(run, pipe), estimate_memory(run, pipe), build_methods(run.methods)
    for method in methods:
        if not method.is_neutral:  # such a one is not applied
            method.check(spec)
    memory = f"The methods will hold up to {held / 2**20:.1f} MiB" if held else ""
    reasons = (method.inactive_reason(spec) for method in methods)
    return [*filter(None, (memory, *reasons))]


def environment(pipe) -> dict:
    """Where a pipeline runs: device, threads, dtype."""
    model = family_of(pipe).denoiser(pipe)  # its dtype is not that of the layers which stay in float32
    device = torch.cuda.get_device_name() if execution_device(pipe).type == "cuda" else "cpu"
    return {"device": device, "threads": torch.get_num_threads(), "dtype": str(model.dtype).removeprefix("torch.")}


def execution_device(pipe) -> torch.device:
    """Where a pipeline computes; with offloading, its weights are elsewhere between two calls."""
    return pipe._execution_device


@dataclass
class Video:
    """A video: frames uint8 (f, h, w, c), latents (1, c, f, h, w) on the CPU, seconds of each stage, and the trace."""

    frames: np.ndarray
    latents: torch.Tensor
    seconds: dict[str, float]
    trace: Trace
    race: Race | None = None  # where previews were recorded
    noise_state: bytes = b""  # of torch's global generator at the end: equal for runs that drew the same from it
    fps: int = 8  # frames per second


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[Callable[[], bytes]]:
    """Inside the context, torch's global generators of the CPU and the device start from a seed; then are as before.

    Stochastic schedulers draw from the device's one, not from the pipeline's generator. Returns a getter of its state.
    Other GPUs keep theirs: another run may be drawing there.
    """
    generators = [torch.default_generator]
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        generators.append(torch.cuda.default_generators[index])
    before = [generator.get_state() for generator in generators]
    try:
        if device.type not in ("cpu", "cuda"):
            torch.manual_seed(seed)  # also that of a device which has one alone
        for generator in generators:
            generator.manual_seed(seed)
        yield lambda: generators[-1].get_state().numpy().tobytes()
    finally:
        for generator, state in zip(generators, before):
            generator.set_state(state)


def generate(run: Run, pipe, defaults: ModelDefaults, on_step: StepCallback | None = None) -> Video:
    """The video of a run. `on_step` is called after each step; its time is not counted.

    Raises AccelError if the model cannot make this size, or not with this solver, or if
    its numbers become infinite or undefined.
    """
    check_size(run, pipe)
    family = family_of(pipe)
    to_video = partial(family.to_video, grid=grid(pipe, run))
    device = execution_device(pipe)
    paused, denoised, final = 0.0, 0.0, torch.empty(0)

    def step_end(_, index: int, t, tensors: dict[str, Any]) -> dict:
        nonlocal paused, denoised, final
        now = synchronized_time(device)
        if index + 1 == pipe.num_timesteps:
            denoised, final = now - paused, to_video(tensors["latents"])
        if not tensors["latents"].isfinite().all():
            raise AccelError(f"step {index + 1} of {pipe.num_timesteps} gave numbers that are not finite: {NOT_FINITE}")
        if on_step:
            on_step(index + 1, trace, to_video(tensors["latents"]))
        paused += synchronized_time(device) - now
        return {}

    started = synchronized_time(device)
    with (
        seeded(run.seed + 1, device) as noise_state,  # the noise that the video begins with is drawn from its own seed
        solver_of(run, pipe),
        apply(pipe, build_methods(run.methods)) as trace,
    ):
        loaded = synchronized_time(device)
        out = pipe(
            prompt=run.prompt, height=run.height, width=run.width, num_frames=run.frames,
            num_inference_steps=run.steps, guidance_scale=run.guidance, max_sequence_length=defaults.text_length,
            generator=torch.Generator("cpu").manual_seed(run.seed), output_type="np", callback_on_step_end=step_end,
        )  # fmt: skip
        decoded = synchronized_time(device) - paused
        drawn = noise_state()
    if not np.isfinite(out.frames[0]).all():
        raise AccelError(f"the decoder gave numbers that are not finite: {NOT_FINITE}")
    frames = (np.asarray(out.frames[0]) * 255).round().astype(np.uint8)
    stages = {"text": trace.started - loaded, "denoise": denoised - trace.started, "decode": decoded - denoised}
    if run.methods:
        stages = {"load": loaded - started, **stages}  # mostly a student's weights
    return Video(frames, final.cpu(), stages, trace, noise_state=drawn, fps=defaults.fps)


def warm_up(run: Run, pipe, defaults: ModelDefaults, on_step: StepCallback | None = None) -> None:
    """Run two steps without methods, and start the video encoder, so that later times include no first start."""
    generate(run.model_copy(update={"steps": 2, "methods": {}}), pipe, defaults, on_step)
    warm_encoder()
