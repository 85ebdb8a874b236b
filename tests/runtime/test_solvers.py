"""Solvers and flow shifts: what they compute on, what comes back, and what is refused."""

from copy import deepcopy
from functools import partial

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from families.tiny import TINY

from accel.errors import AccelError
from accel.runtime.models import ModelDefaults
from accel.runtime.run import SOLVERS, build_run
from accel.runtime.solvers import build_scheduler, solver_of
from accel.students.euler_scheduler import CombiningScheduler, use_scheduler

DEFAULTS = ModelDefaults(height=64, width=64, frames=5, steps=8)
OTHERS = ("unipc", "euler", "dpm++2m", "dpm++2s")


def run_of(solver="default", shift=None, **more):
    return build_run(DEFAULTS, model="m", prompt="a red star", solver=solver, shift=shift, **more)


def latents(pipe, sample, run):
    with solver_of(run, pipe):
        return sample(pipe, steps=run.steps)


def test_every_solver_has_a_name():
    assert SOLVERS == ("default", *OTHERS)


@pytest.mark.parametrize(
    "settings", [{}, {"solver": "unipc"}, {"shift": 3.0}, {"solver": "unipc", "shift": 3.0}], ids=str
)
def test_the_models_own_solver_and_shift_give_the_same_bits(settings, pipe, sample):
    assert torch.equal(latents(pipe, sample, run_of(**settings)), sample(pipe, steps=8))


@pytest.mark.parametrize("solver", OTHERS)
@pytest.mark.parametrize("shift", [None, 5.0])
def test_every_solver_has_the_noise_levels_of_the_models_own(solver, shift, pipe):
    own, other = (build_scheduler(run_of(name, shift), pipe.scheduler) for name in ("default", solver))
    own.set_timesteps(8)
    other.set_timesteps(8)
    assert torch.allclose(own.sigmas, other.sigmas, atol=5e-3)


def test_solvers_agree_in_many_steps_and_not_in_few(pipe, sample):
    sample = partial(sample, guidance=1.0)
    best = sample(pipe, steps=120)
    for solver in OTHERS:
        many, few = (latents(pipe, sample, run_of(solver, steps=steps)) for steps in (60, 4))
        assert (many - best).norm() < 0.02 * best.norm() and (many - best).norm() < (few - best).norm()


@pytest.mark.parametrize("solver", OTHERS)
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_the_fewest_steps_are_finite(solver, steps, pipe, sample):
    assert latents(pipe, sample, run_of(solver, steps=steps)).isfinite().all()


@pytest.mark.parametrize("solver", OTHERS)
def test_a_solver_works_on_a_pipeline_with_an_euler_scheduler(solver, pipe, sample):
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    assert build_scheduler(run_of(solver, 7.0), pipe.scheduler).config.get("flow_shift", 7.0) == 7.0
    assert latents(pipe, sample, run_of(solver)).isfinite().all()


def test_an_euler_scheduler_is_its_own_euler_and_one_with_rising_noise_levels_has_no_other_solver():
    own = FlowMatchEulerDiscreteScheduler(shift=3.0, invert_sigmas=True)  # as Mochi's
    assert type(build_scheduler(run_of("euler"), own)) is FlowMatchEulerDiscreteScheduler
    for solver in ("unipc", "dpm++2m", "dpm++2s"):
        with pytest.raises(AccelError, match="counts its noise levels upwards"):
            build_scheduler(run_of(solver), own)


@pytest.mark.parametrize("solver", ["unipc", "dpm++2m", "dpm++2s"])
@pytest.mark.parametrize("family", ["ltx", "hunyuan_video"])
def test_solvers_agree_on_a_pipeline_that_gives_its_scheduler_sigmas(family, solver):
    pipe, inputs = TINY[family]()

    def latents(solver: str):
        with solver_of(run_of(solver, 3.0), pipe):
            noise = torch.Generator().manual_seed(0)
            return pipe(**inputs, num_inference_steps=40, generator=noise, output_type="latent").frames

    best = latents("euler")
    assert (latents(solver) - best).norm() < 0.05 * best.norm()


def test_a_fitted_solver_takes_the_number_of_the_timesteps_that_a_pipeline_gives_it():
    pipe, inputs = TINY["ltx_condition"]()
    inputs = {name: value for name, value in inputs.items() if name not in ("image", "conditions", "video")}
    with use_scheduler(pipe, CombiningScheduler([1.0, 0.5, 0.2, 0.0], [1000, 500, 200], lambda step, sample: sample)):
        frames = pipe(**inputs, num_inference_steps=3, output_type="latent").frames
    assert frames.isfinite().all() and pipe.num_timesteps == 3


def test_a_solver_that_would_end_at_another_noise_level_is_refused():
    own = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.1)  # as LTX's
    for solver in ("unipc", "dpm++2m", "dpm++2s"):
        with pytest.raises(AccelError, match="last step is at a noise level of 0.1"):
            build_scheduler(run_of(solver, 3.0), own)
    assert build_scheduler(run_of("euler", 3.0), own).config.shift_terminal == 0.1


def test_the_shift_moves_the_noise_levels(pipe):
    low, high = (build_scheduler(run_of(shift=shift), pipe.scheduler) for shift in (1.0, 9.0))
    low.set_timesteps(8)
    high.set_timesteps(8)
    assert (high.sigmas[1:-1] > low.sigmas[1:-1]).all()


def test_the_pipelines_scheduler_comes_back_after_an_error(pipe):
    own, before = pipe.scheduler, deepcopy(dict(pipe.scheduler.config))
    with pytest.raises(KeyError), solver_of(run_of("dpm++2m", 5.0), pipe):
        assert pipe.scheduler is not own
        raise KeyError
    assert pipe.scheduler is own and dict(own.config) == before


def test_a_solver_together_with_a_student_is_refused():
    for settings in ({"solver": "euler"}, {"shift": 2.0}):
        with pytest.raises(AccelError, match="not possible with gpd, which brings its own noise levels"):
            run_of(**settings, methods={"gpd": {}}, steps=6)
    assert run_of(methods={"gpd": {}}, steps=6).solver == "default"


def test_a_pipeline_that_is_not_for_flow_matching_is_refused(pipe):
    with pytest.raises(AccelError, match="DDIMScheduler is no scheduler for flow matching"):
        build_scheduler(run_of("euler"), DDIMScheduler())
    dynamic = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    with pytest.raises(AccelError, match="depends on the size, so another solver needs one: set shift"):
        build_scheduler(run_of("unipc"), dynamic)
    assert not build_scheduler(run_of("euler", 2.0), dynamic).config.use_dynamic_shifting
