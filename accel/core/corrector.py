"""Takes the solver's steps again after a pause between computed outputs, now that the next output is known.

Between two computed outputs, a solver has been given predicted ones. When the second is computed, the outputs between
are known better: on the line through both, in the log signal-to-noise ratio. As in a predictor-corrector method, the
solver then goes back to the first and takes the same steps with those, which costs no call of the model. The second
output was computed from a sample that is now a little different; `response` says how much it changes with that.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import wraps
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from diffusers import SchedulerMixin
from torch import Tensor

from ..ops.noise import log_snr
from .calls import running_call
from .denoising_loop import is_flow, is_same
from .hooks import patched_method

if TYPE_CHECKING:
    from .host import Host

# Spread of the videos that are still possible, in units of the latents: with less noise than that, a change of the
# sample is partly a change of the video. Measured on tiny-wan, as the output's change along the correction.
SPREAD = 0.3
LEAST = 0.6  # of a correction that the output takes back at little noise: the last corrections are the least certain
CLEAN = 0.05  # sigma below which the response grows no more: a network's velocity is bounded


@dataclass(frozen=True)
class Taken:
    """A step of the solver: what it was called with beside the output and the sample."""

    position: float  # log signal-to-noise ratio
    timestep: Any
    named: dict[str, Any]


@dataclass
class Corrector:
    """The solver of one run, with its steps since the last computed output."""

    scheduler: SchedulerMixin
    inner: Callable  # its step
    state: dict[str, Any] | None = None  # the scheduler's, before its step with the last computed output
    sample: Tensor | None = None  # and its sample there
    output: Tensor | None = None
    source: tuple[int, int, bool] = (0, 0, False)  # which model's output it is, of which text, and whether guided
    taken: list[Taken] | None = None  # since then; None: nothing can be corrected
    following: Tensor | None = None  # a copy of the sample that the last step returned
    draws_noise: bool = False  # found out in the first step

    def step(self, host: Host, is_computed: bool, output: Tensor, timestep, sample: Tensor, **named):
        """The scheduler's step; after a pause it goes on from the corrected sample."""
        if self.draws_noise:
            return self.inner(output, timestep, sample, **named)
        generators = _generator_states(sample, named) if self.following is None else None
        scheduler, position = self.scheduler, log_snr(host.signal, host.step.sigma)
        if self.following is None or not self._is_following(sample, host.latents.dtype):
            self.taken = None
        if is_computed:
            source = host.active_index, host.text_id, host.is_guided
            if self.taken and len(self.taken) > 1 and self.source == source:
                corrected = self._retake(position, output)
                rises = scheduler.config.get("invert_sigmas") or named.get("per_token_timesteps") is not None
                change = response(host.step.sigma) * (corrected - sample).to(output.dtype)
                output = output - change if rises else output + change  # such a solver is given the negative velocity
                sample = corrected
            self.state, self.sample, self.output = _state_of(scheduler), sample.clone(), output
            self.source, self.taken = source, []
        if self.taken is not None:
            self.taken.append(Taken(position, timestep, named))
        result = self.inner(output, timestep, sample, **named)
        self.following = (result[0] if isinstance(result, tuple) else result.prev_sample).clone()
        if generators:
            self.draws_noise = generators != _generator_states(sample, named)
        return result

    def _is_following(self, sample: Tensor, dtype: torch.dtype) -> bool:
        """Whether a sample is what the last step returned: a callback may have changed it, also in its own memory.

        They are compared as the model sees them, since some pipelines round the sample between two steps.
        """
        return is_same(self.following.to(dtype), sample.to(dtype))

    def _retake(self, position: float, output: Tensor) -> Tensor:
        """The present sample, if the outputs between had been on the line from the last computed one to this one."""
        vars(self.scheduler).update(self.state)
        sample, first = self.sample, self.taken[0].position
        for step in self.taken:
            share = (step.position - first) / (position - first) if position != first else 0.0  # both at the limit
            between = torch.lerp(self.output, output, share)
            sample = self.inner(between, step.timestep, sample, **{**step.named, "return_dict": False})[0]
        return sample


def response(sigma: float) -> float:
    """By how much a flow model's velocity changes with the sample, along a small change of it.

    The velocity is (x - x0) / sigma. For signals of standard deviation `SPREAD` around their mean, the best guess of
    x0 moves by (1 - sigma) SPREAD^2 / ((1 - sigma)^2 SPREAD^2 + sigma^2) of the change. At least `LEAST` of the change
    counts as noise, and sigma as at least `CLEAN`.
    """
    best_guess = (1 - sigma) * SPREAD**2 / (((1 - sigma) * SPREAD) ** 2 + sigma**2)
    return max(LEAST, 1 - best_guess) / max(CLEAN, sigma)


@contextmanager
def corrected(host: Host, is_computed: Callable[[], bool]) -> Iterator[Callable[[], None]]:
    """Inside the context, the pipeline's solver corrects the steps between computed outputs, where it can.

    It can with flow models, and solvers that draw no noise. `is_computed()`: whether the present step's output is.
    Yields what is to be called when a run begins, whose pipeline may have another solver by then.
    """
    known: dict[int, SchedulerMixin] = {}

    def attach(scheduler) -> None:
        if id(scheduler) not in known and _is_correctable(scheduler):
            known[id(scheduler)] = scheduler
            stack.enter_context(patched_method(scheduler, "step", _corrected_step(scheduler, host, is_computed)))

    with ExitStack() as stack:
        attach(host.pipe.scheduler)
        yield lambda: attach(running_call(host.pipe)[0].scheduler)


def _is_correctable(scheduler) -> bool:
    # a scheduler inside this one has a state of its own, which would not go back
    has_another = any(isinstance(value, SchedulerMixin) for value in vars(scheduler).values())
    combines = getattr(scheduler, "combines_outputs", False)
    return _first_parameters(scheduler) == ["model_output", "timestep", "sample"] and not has_another and not combines


def _first_parameters(scheduler) -> list[str]:
    return list(inspect.signature(scheduler.step).parameters)[:3]


def _corrected_step(scheduler, host: Host, is_computed: Callable[[], bool]) -> MethodType:
    """In place of the scheduler's step: that of the run's `Corrector`."""
    inner, names = scheduler.step, _first_parameters(scheduler)
    run = host.per_run(lambda: Corrector(scheduler, inner))

    @wraps(type(scheduler).step)  # pipelines look at its parameters
    def step(self, *inputs, **named):
        if self is not scheduler:  # a copy, of which some pipelines make one for each frame
            return type(self).step(self, *inputs, **named)
        known = {**dict(zip(names, inputs)), **named}
        if len(inputs) > 3 or host.step is None or not is_flow(scheduler):
            return inner(*inputs, **named)
        output, timestep, sample = (known.pop(name) for name in names)
        return run().step(host, is_computed(), output, timestep, sample, **known)

    return MethodType(step, scheduler)


def _generator_states(sample: Tensor, named: dict[str, Any]) -> list[bytes]:
    """The states of the generators from which a solver can draw noise."""
    given = named.get("generator")
    states = [torch.get_rng_state(), *([torch.cuda.get_rng_state(sample.device)] if sample.is_cuda else [])]
    states += [each.get_state() for each in (given if isinstance(given, list) else [given]) if each is not None]
    return [state.numpy().tobytes() for state in states]


def _state_of(scheduler) -> dict[str, Any]:
    """What a scheduler holds; its lists are changed in place, its tensors are not."""
    return {name: list(value) if isinstance(value, list) else value for name, value in vars(scheduler).items()}
