"""Calibrates diffusers' MagCache for a model: in one run, how the magnitude of the residual changes at each step."""

from __future__ import annotations

from pathlib import Path
from statistics import mean

from diffusers.hooks import MagCacheConfig
from torch import nn

from ..core.foreign import DiffusersCache
from ..errors import AccelError
from ..families import family_of
from ..methods.peers import RATIOS, MagCache, Ratios
from ..runtime.generate import generate
from ..runtime.models import ModelDefaults, load_pipeline, model_defaults, write_results
from ..runtime.run import Run, build_run


def run_calibration(model: str, prompt: str, seed: int, steps: int | None, out: Path) -> dict:
    """Model, steps and ratios, after writing magcache.json; a local model gets a copy.

    Diffusers measures the ratios in its own calibration mode; those of the branches of guidance are averaged. Raises
    AccelError for a model on which MagCache cannot run.
    """
    pipe = load_pipeline(model)
    family, defaults = family_of(pipe), model_defaults(pipe, model)
    denoisers = family.denoisers(pipe)
    if len(denoisers) > 1:
        raise AccelError("MagCache (diffusers) cannot be calibrated for two transformers: choose a model with one")
    MagCache().check_model(family, denoisers[0])
    run = build_run(defaults, model=model, prompt=prompt, seed=seed, steps=steps)
    ratios = Ratios(steps=run.steps, ratios=_measure(run, pipe, defaults, denoisers[0]))
    written = write_results(model, out, RATIOS, ratios.model_dump_json())
    return {"model": model, **ratios.model_dump(), "written": [str(file) for file in written]}


def _measure(run: Run, pipe, defaults: ModelDefaults, model: nn.Module) -> list[float]:
    """The ratio of each step, read before diffusers forgets them at the end of the run."""
    found: list[list[float]] = []

    def on_step(done: int, *_) -> None:
        if done == run.steps:
            found.extend(state.calibration_ratios for state in cache.hooks[0].state_manager._state_cache.values())

    cache = DiffusersCache(model, MagCacheConfig(calibrate=True, num_inference_steps=run.steps + 1))
    cache.take()
    try:
        generate(run, pipe, defaults, on_step)
    finally:
        cache.leave()
    return [round(mean(ratios), 5) for ratios in zip(*found)]
