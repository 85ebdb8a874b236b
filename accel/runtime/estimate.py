"""What a run will take on this machine, said before it starts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

from ..core.flops import count_flops
from ..core.trace import DENOISER
from ..families import family_of
from ..methods.base import RunSpec
from .generate import estimate_memory, planned_spec
from .models import model_defaults
from .presets import build_methods
from .run import Run

StepSeconds = Callable[[Run], float | None]  # seconds of the stock pipeline's step, in a run's size and guidance
MeasuredWork = Callable[[Run], float | None]  # share of FLOPs that the settings of a run left with another prompt


@dataclass(frozen=True)
class Estimate:
    """Seconds of denoising (None: no step was measured yet), whether they are an upper bound, and cached bytes."""

    seconds: float | None
    at_most: bool
    memory_bytes: int

    @property
    def words(self) -> str:
        """Time and memory, as "at most about 4 s of denoising, up to 6.9 MiB cached"."""
        bound = "at most about" if self.at_most else "about"
        known = self.seconds is not None
        time = f"{bound} {duration(self.seconds)} of denoising" if known else "time not known before the first run"
        memory = f"up to {self.memory_bytes / 2**20:.1f} MiB cached" if self.memory_bytes else ""
        return ", ".join(filter(None, (time, memory)))


def estimate(
    run: Run, pipe, step_seconds: StepSeconds, measured_work: MeasuredWork = lambda run: None
) -> Estimate:  # fmt: skip
    """What a run will take, from the measured seconds of full steps and the share of work that is known beforehand.

    Where a method's share depends on the video, that of an earlier one is taken; without one, the method counts as if
    it saved nothing. The pipeline is only read.
    """
    shares = expected_shares(run, pipe)
    step, unguided = step_seconds(run), run.guidance <= 1
    if step is None and unguided:
        guided = step_seconds(run.model_copy(update={"guidance": 2.0}))
        step = guided and guided / (1 if family_of(pipe).embeds_guidance else 2)  # calls of a guided step
    measured = measured_work(run) if None in shares else None
    work = prod(share for share in shares if share is not None) if measured is None else measured
    seconds = None if step is None else run.steps * step * work
    return Estimate(seconds, None in shares and measured is None, estimate_memory(run, pipe))


def expected_shares(run: Run, pipe) -> list[float | None]:
    """For each method of a run, the share of FLOPs that it leaves; None where that is not known beforehand."""
    if not run.methods:
        return []
    spec = planned_spec(run, pipe)
    flops = _full_flops(spec, model_defaults(pipe, run.model).text_length)
    if flops is None:
        return [None] * len(run.methods)
    return [method.expected_work(spec, flops) for method in build_methods(run.methods)]


def step_flops(run: Run, pipe) -> int:
    """FLOPs of a step of the stock pipeline in a run's size: one call, or two with guidance.

    Where a family does not tell what a call gets, they are those of the weights with the video's tokens, and of its
    self-attentions.
    """
    spec = planned_spec(run, pipe)
    calls = 1 + spec.guided
    if flops := _full_flops(spec, model_defaults(pipe, run.model).text_length):
        return flops[DENOISER] * calls
    weights = sum(p.numel() for p in spec.model.parameters())
    return calls * spec.tokens * (2 * weights + 4 * spec.tokens * spec.family.hidden_size(spec.model) * spec.num_layers)


def _full_flops(spec: RunSpec, text_length: int) -> dict[str, int] | None:
    """FLOPs of one call of the denoiser for one prompt, where the family tells what such a call gets."""
    inputs = spec.family.call_inputs(spec.model, text_length)
    return inputs and count_flops(spec.model, spec.latents, inputs)


def duration(seconds: float) -> str:
    """Seconds in words: "2.3 s", "45 s", "12 min" or "3.5 h"."""
    if seconds < 99.5:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5970 else f"{seconds / 3600:.1f} h"
