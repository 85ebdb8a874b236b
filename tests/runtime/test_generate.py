"""Generating a video: numbers that are not finite are refused with their step; all noise comes from the seed."""

from contextlib import contextmanager

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from accel.errors import AccelError
from accel.runtime.generate import environment, generate, seeded
from accel.runtime.models import TINY, read_defaults
from accel.runtime.run import build_run
from accel.students.euler_scheduler import use_scheduler

DEFAULTS = read_defaults(TINY)


def run_of(**settings):
    small = {"height": 32, "width": 32, "frames": 5, "steps": 3}
    return build_run(DEFAULTS, model=TINY, prompt="a red star spins", **{**small, **settings})


@contextmanager
def damaged(parameter: torch.Tensor):
    """One weight that is not a number."""
    before = parameter.data.clone()
    parameter.data.flatten()[0] = float("nan")
    try:
        yield
    finally:
        parameter.data = before


def test_damaged_weights_of_the_denoiser_are_refused_at_the_first_step(tiny_wan):
    with damaged(tiny_wan.transformer.proj_out.weight):
        with pytest.raises(AccelError, match="^step 1 of 3 gave numbers that are not finite: the weights are damaged"):
            generate(run_of(), tiny_wan, DEFAULTS)
    assert generate(run_of(), tiny_wan, DEFAULTS).frames.any()


def test_numbers_that_overflow_later_are_refused_at_their_step(tiny_wan):
    def overflow(done, trace, latents):
        if done == 2:
            latents.fill_(float("inf"))

    with pytest.raises(AccelError, match="^step 3 of 3 gave numbers that are not finite"):
        generate(run_of(), tiny_wan, DEFAULTS, overflow)


def test_damaged_weights_of_the_decoder_are_refused(tiny_wan):
    with damaged(tiny_wan.vae.decoder.conv_out.weight):
        with pytest.raises(AccelError, match="^the decoder gave numbers that are not finite"):
            generate(run_of(), tiny_wan, DEFAULTS)


@pytest.mark.parametrize("solver", ["euler", "dpm++2m"])
def test_another_solver_makes_another_video_and_leaves_the_pipeline_as_it_was(solver, tiny_wan):
    own = tiny_wan.scheduler
    default, other = (generate(run_of(solver=name), tiny_wan, DEFAULTS).latents for name in ("default", solver))
    assert not torch.equal(default, other) and tiny_wan.scheduler is own
    assert torch.equal(generate(run_of(), tiny_wan, DEFAULTS).latents, default)


def test_a_stochastic_scheduler_draws_from_the_seed_of_the_run(tiny_wan):
    before = torch.get_rng_state()
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, stochastic_sampling=True)
    with use_scheduler(tiny_wan, scheduler):
        first, again, other = (generate(run_of(seed=seed), tiny_wan, DEFAULTS) for seed in (0, 0, 2**63 - 1))
        longer = generate(run_of(steps=4), tiny_wan, DEFAULTS)
    assert torch.equal(first.latents, again.latents) and first.noise_state == again.noise_state
    assert not torch.equal(first.latents, other.latents) and first.noise_state != longer.noise_state
    assert torch.equal(torch.get_rng_state(), before)


def test_the_global_generator_is_as_before_also_after_an_error():
    before = torch.get_rng_state()
    with pytest.raises(ZeroDivisionError), seeded(3, torch.device("cpu")) as state:
        first = state()
        torch.rand(1)
        assert state() != first
        raise ZeroDivisionError
    assert torch.equal(torch.get_rng_state(), before)


def test_a_deterministic_scheduler_draws_nothing_at_any_number_of_steps(tiny_wan):
    states = {generate(run_of(steps=steps), tiny_wan, DEFAULTS).noise_state for steps in (2, 3)}
    assert len(states) == 1


def test_the_device_is_the_one_that_computes_also_where_weights_are_offloaded(pipe, monkeypatch):
    monkeypatch.setattr(type(pipe), "_execution_device", torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    assert environment(pipe)["device"] == "a GPU" and next(pipe.transformer.parameters()).device.type == "cpu"
