"""The corrector: what it gives back to the solver, and where it leaves the solver alone."""

import copy
import math
from contextlib import nullcontext
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchLCMScheduler,
    UniPCMultistepScheduler,
)

import accel
from accel.core.corrector import CLEAN, LEAST, SPREAD, Corrector, corrected, response
from accel.methods import StepCache
from accel.ops.noise import log_snr

FULL = "0 1 4 7 11"


def host_of(scheduler, dtype=torch.float32):
    """As much of a host as the corrector needs; no run has begun."""
    pipe, latents = SimpleNamespace(scheduler=scheduler), torch.ones(1, dtype=dtype)
    about = {"active_index": 0, "text_id": 1, "is_guided": True, "step": None}
    return SimpleNamespace(pipe=pipe, latents=latents, per_run=cache, **about)


def sampled(scheduler, full_steps, corrects: bool, steps: int = 24, after=None, call=None, dtype=torch.float32):
    """What a solver makes of noise 1 for a model of signals around a rising mean; between, its output is reused.

    `after(sample before, sample after)`: what a pipeline makes of it; `call(v, timestep, x)`: how it calls the solver.
    """
    scheduler.set_timesteps(steps)
    host = host_of(scheduler, dtype)
    call = call or (lambda v, timestep, x: scheduler.step(v, timestep, x, return_dict=False)[0])
    x, v = torch.ones(1, 1, 1, 1, 1), None
    with corrected(host, lambda: host.step.index in full_steps) if corrects else nullcontext():
        for i, timestep in enumerate(scheduler.timesteps):
            sigma = float(scheduler.sigmas[i])
            host.step, host.signal = SimpleNamespace(index=i, sigma=sigma), 1 - sigma
            if i in full_steps:
                mean = math.tanh(log_snr(1 - sigma, sigma) / 4)
                v = response(sigma) * (x - (1 - sigma) * mean) - mean
            result = call(v, timestep, x)
            x = after(x, result) if after else result
    return float(x)


SOLVERS = {
    "euler": lambda: FlowMatchEulerDiscreteScheduler(shift=3.0),
    "unipc": lambda: UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0),
    "dpm++": lambda: DPMSolverMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0
    ),
}


@pytest.mark.parametrize("name", SOLVERS)
def test_a_pause_between_computed_outputs_costs_less_once_it_is_corrected(name):
    full = {0, 1, 2, 3, 5, 7, 10, 13, 16, 19, 21, 23}
    exact = sampled(SOLVERS[name](), set(range(24)), corrects=False)
    error = {on: abs(sampled(SOLVERS[name](), full, on) - exact) for on in (True, False)}
    assert error[True] < 0.8 * error[False]


@pytest.mark.parametrize("name", SOLVERS)
def test_without_a_pause_the_solver_is_as_it_was(name):
    full = set(range(24))
    assert sampled(SOLVERS[name](), full, True) == sampled(SOLVERS[name](), full, False)


def test_pauses_where_the_log_snr_is_at_its_limit_are_taken_again_with_the_same_output():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=300.0)
    scheduler.set_timesteps(24)
    assert log_snr(1 - float(scheduler.sigmas[1]), float(scheduler.sigmas[1])) == log_snr(0, 1)
    assert math.isfinite(sampled(scheduler, {0, 1, 4, 23}, True))


def test_predicted_steps_are_taken_again_on_the_line_between_full_passes(pipe, sample, monkeypatch):
    """A scheduler that adds up outputs gets, for each step between, the line between the full passes around it."""
    seen = []
    step = FlowMatchEulerDiscreteScheduler.step

    def spy(self, model_output, timestep, sample, **named):
        seen.append((self.step_index or 0, float(model_output.mean())))
        return step(self, model_output, timestep, sample, **named)

    monkeypatch.setattr(FlowMatchEulerDiscreteScheduler, "step", spy)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    with accel.apply(pipe, [StepCache(full_steps=FULL)]) as trace:
        sample(pipe, steps=12)
    assert [index for index, _ in seen] == [0, 1, 2, 3, 1, 2, 3, 4, 5, 6, 4, 5, 6, 7, 8, 9, 10, 7, 8, 9, 10, 11]
    again = dict(seen[4:7])
    first, last, (a, b) = again[1], seen[7][1], (log_snr(1 - trace.sigmas[i], trace.sigmas[i]) for i in (1, 4))
    for i in (2, 3):
        share = (log_snr(1 - trace.sigmas[i], trace.sigmas[i]) - a) / (b - a)
        assert again[i] == pytest.approx(first + share * (last - first), abs=0.05)  # the last one also responds


def test_a_solver_that_draws_noise_is_left_alone(pipe, sample):
    pipe.scheduler = FlowMatchLCMScheduler(shift=3.0)
    runs = []
    for on in (True, False):
        with accel.apply(pipe, [StepCache(full_steps=FULL, corrector=on)]):
            torch.manual_seed(0)
            runs.append(sample(pipe, steps=12))
    assert torch.equal(*runs)


@pytest.mark.parametrize("change", [torch.zeros_like, torch.zero_], ids=["new tensor", "in place"])
def test_latents_that_a_callback_changes_are_not_corrected_away(change, pipe, sample):
    """Zeros that come between two full passes stay: the steps before them are not taken again."""
    zero = lambda pipe, step, time, kept: {"latents": change(kept["latents"])} if step == 5 else {}
    runs = []
    for on in (True, False):
        with accel.apply(pipe, [StepCache(full_steps="0 1 2 3 4 9 10 11", corrector=on)]):
            runs.append(sample(pipe, steps=12, on_step=zero))
    assert torch.equal(*runs)


def test_steps_before_a_new_prompt_are_not_taken_again_with_its_output(pipe, sample):
    """The prompt changes after step 6; step 7 and all later ones are full, so that only the pause before it is left."""
    words = torch.randn(1, 6, 16, generator=torch.Generator().manual_seed(5))
    renew = lambda pipe, step, time, kept: {"prompt_embeds": words} if step == 6 else {}
    runs = []
    for on in (True, False):
        with accel.apply(pipe, [StepCache(full_steps="0 1 2 3 4 8 9 10 11", corrector=on)]) as trace:
            runs.append(sample(pipe, steps=12, on_step=renew))
        assert trace.method_data["stepcache"]["full_steps"] == [0, 1, 2, 3, 4, 7, 8, 9, 10, 11]
    assert torch.equal(*runs)


PAUSES = {0, 1, 5, 10, 15, 23}


def test_a_pipeline_that_overwrites_its_sample_is_corrected_alike():
    overwritten = sampled(SOLVERS["euler"](), PAUSES, True, after=lambda x, result: x.copy_(result))
    assert overwritten == sampled(SOLVERS["euler"](), PAUSES, True) != sampled(SOLVERS["euler"](), PAUSES, False)


def test_a_solver_that_is_given_the_negative_velocity_is_corrected_alike():
    """Euler with a time for each token, as LTX's pipeline for conditions calls it."""
    scheduler = SOLVERS["euler"]()

    def call(v, timestep, x):
        tokens = dict(per_token_timesteps=timestep.reshape(1, 1), return_dict=False)
        return scheduler.step(-v.flatten(0, 1), timestep, x.flatten(0, 1), **tokens)[0].unflatten(0, (1, 1))

    plain = sampled(SOLVERS["euler"](), PAUSES, True)
    assert sampled(scheduler, PAUSES, True, call=call) == pytest.approx(plain, rel=1e-4)


def test_a_sample_that_the_pipeline_rounds_between_steps_is_still_corrected(monkeypatch):
    retakes, retake = [], Corrector._retake
    monkeypatch.setattr(Corrector, "_retake", lambda *a: retakes.append(a) or retake(*a))
    sampled(SOLVERS["euler"](), PAUSES, True, after=lambda x, y: y.bfloat16().float(), dtype=torch.bfloat16)
    assert len(retakes) == 4


def test_a_copy_of_the_solver_takes_steps_of_its_own():
    """Some pipelines copy their scheduler for each frame."""
    scheduler = SOLVERS["unipc"]()
    scheduler.set_timesteps(24)
    x, v = torch.ones(1, 1, 1, 1, 1), torch.full((1, 1, 1, 1, 1), 0.5)
    with corrected(host_of(scheduler), lambda: True):
        other = copy.deepcopy(scheduler)
        first = other.step(v, scheduler.timesteps[0], x, return_dict=False)[0]
        assert (other.step_index, scheduler.step_index) == (1, None)
        plain = scheduler.step(v, scheduler.timesteps[0], x, return_dict=False)[0]  # outside a run of the host
    assert torch.equal(first, plain)


def test_the_pipeline_gets_its_own_solver_back(pipe, sample):
    before = dict(vars(pipe.scheduler))
    with accel.apply(pipe, [StepCache(full_steps=FULL)]):
        assert "step" in vars(pipe.scheduler)
    assert "step" not in vars(pipe.scheduler) and vars(pipe.scheduler).keys() == before.keys()


def test_a_solver_that_is_exchanged_inside_the_context_is_corrected_too(pipe, sample):
    own, other, method = pipe.scheduler, SOLVERS["euler"](), StepCache(full_steps=FULL)
    pipe.scheduler = other
    with accel.apply(pipe, [method]):
        expected = sample(pipe, steps=12)
    pipe.scheduler = own
    with accel.apply(pipe, [method]):
        pipe.scheduler = other
        assert torch.equal(sample(pipe, steps=12), expected)
    assert "step" not in vars(own) and "step" not in vars(other)


def test_a_second_pipeline_of_the_same_transformer_is_corrected_with_its_own_solver(pipe, sample):
    """The first one's solver, a UniPC, was exchanged for an Euler since."""
    second, method = type(pipe)(**pipe.components), StepCache(full_steps=FULL)
    with accel.apply(pipe, [method]):
        expected = sample(pipe, steps=12)
        pipe.scheduler = SOLVERS["euler"]()
        assert torch.equal(sample(second, steps=12), expected)


def test_the_response_is_that_of_signals_with_a_known_spread():
    """The velocity (x - x0) / sigma, where the best guess x0 of a signal around 0 has moved with x by 1 - s."""
    for sigma in (0.5, 0.7, 0.95):
        variance = ((1 - sigma) * SPREAD) ** 2 + sigma**2
        assert response(sigma) * sigma == pytest.approx((variance - (1 - sigma) * SPREAD**2) / variance)
    assert response(1.0) == 1 and response(CLEAN) == response(0.001) == pytest.approx(LEAST / CLEAN)
