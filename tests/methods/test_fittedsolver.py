"""The fitted solver: which calls run, what it makes of their outputs, and what it refuses."""

from pathlib import Path

import pytest
import torch
from diffusers import UniPCMultistepScheduler
from pydantic import ValidationError
from support import euler_as_fitted_solver

import accel
from accel.errors import AccelError
from accel.methods import FasterCache, FittedSolver, MeanFlow
from accel.methods.fittedsolver import Solver
from accel.runtime.generate import preflight
from accel.runtime.models import ModelDefaults
from accel.runtime.run import build_run
from accel.students.euler_scheduler import FixedSigmaEuler, use_scheduler

STEPS = 6


def fitted(pipe, tmp_path, **more) -> FittedSolver:
    """The method with Euler's weights in a file."""
    file = tmp_path / "solver.json"
    file.write_text(euler_as_fitted_solver(pipe, STEPS, **{"uncond_steps": range(STEPS), **more}).model_dump_json())
    return FittedSolver(steps=STEPS, solver=str(file))


def test_with_the_weights_of_euler_it_is_euler(pipe, sample, tmp_path):
    method = fitted(pipe, tmp_path)
    pipe.scheduler.set_timesteps(STEPS)
    euler = FixedSigmaEuler(pipe.scheduler.sigmas.tolist(), pipe.scheduler.timesteps.tolist())
    with use_scheduler(pipe, euler):
        expected = sample(pipe, steps=STEPS)
    with accel.apply(pipe, [method]):
        torch.testing.assert_close(sample(pipe, steps=STEPS), expected, rtol=1e-4, atol=1e-4)
    assert isinstance(pipe.scheduler, UniPCMultistepScheduler)


def test_steps_leave_out_the_unconditional_branch(pipe, sample, tmp_path):
    calls = []
    pipe.transformer.blocks[0].ffn.register_forward_hook(lambda *_: calls.append(1))
    method = fitted(pipe, tmp_path, uncond_steps=[0, 3, 5])
    with accel.apply(pipe, [method]) as trace:
        sample(pipe, steps=STEPS)
    kinds = {(e.step, e.branch): e.action for e in trace.events.values() if e.layer == "denoiser"}
    assert [kinds[i, "uncond"] for i in range(STEPS)] == [
        "compute", "rebuild", "rebuild", "compute", "rebuild", "compute",
    ]  # fmt: skip
    assert all(kinds[i, "cond"] == "compute" for i in range(STEPS))
    assert len(calls) == 9 and trace.summary()["flops_ratio"] == pytest.approx(9 / 12)
    assert trace.peak_bytes == trace.estimated_bytes > 0


def test_the_next_sample_is_a_weighted_sum_of_the_sample_and_all_outputs_so_far():
    solver = Solver(
        steps=2, guidance=1.0, sigmas=[1.0, 0.5, 0.0], timesteps=[1000, 500], uncond_steps=[1],
        weights=[[1.0, 2.0], [0.5, 1.0, -1.0, 3.0]], base_fingerprint=[],
    )  # fmt: skip
    outputs = [torch.full((1, 2), value, dtype=torch.bfloat16) for value in (1.0, 4.0, 2.0)]
    assert solver.next_sample(0, torch.ones(1, 2), outputs[:1]).tolist() == [[3.0, 3.0]]
    x = solver.next_sample(1, torch.ones(1, 2), outputs)
    assert x.tolist() == [[3.5, 3.5]] and x.dtype == torch.float32


def test_a_file_with_too_few_weights_is_refused():
    with pytest.raises(ValidationError, match="one weight for the sample and one for each output so far"):
        Solver(
            steps=1, guidance=1.0, sigmas=[1.0, 0.0], timesteps=[1000], uncond_steps=[0], weights=[[1.0, 2.0]],
            base_fingerprint=[],
        )  # fmt: skip


def test_another_guidance_is_refused(pipe, sample, tmp_path):
    with pytest.raises(AccelError, match="fitted to guidance 4, not 6: set guidance to 4"):
        with accel.apply(pipe, [fitted(pipe, tmp_path)]):
            sample(pipe, steps=STEPS, guidance=6.0)


def test_what_the_solver_leaves_out_is_refused(pipe, sample, tmp_path):
    method = fitted(pipe, tmp_path)
    with pytest.raises(AccelError, match="has no unconditional branch, and the solver was fitted with one"):
        with accel.apply(pipe, [fitted(pipe, tmp_path, guidance=1.0)]):
            sample(pipe, steps=STEPS, guidance=1.0)
    with pytest.raises(AccelError, match="keep it, and run the same pipeline"), accel.apply(pipe, [method]):
        pipe.scheduler = UniPCMultistepScheduler.from_config(pipe.scheduler.config)
        sample(pipe, steps=STEPS)
    with pytest.raises(AccelError, match="fitted for 6 steps, not 8"), accel.apply(pipe, [method]):
        sample(pipe, steps=8)


def test_another_guidance_is_refused_before_the_run(pipe, tmp_path):
    method, defaults = fitted(pipe, tmp_path), ModelDefaults(height=64, width=64, frames=5)
    run = build_run(defaults, model="-", prompt="-", methods={"fittedsolver": method.model_dump()}, guidance=5.0)
    with pytest.raises(AccelError, match="fitted to guidance 4, not 5"):
        preflight(run, pipe)


def test_a_damaged_file_is_refused(pipe, tmp_path):
    method = fitted(pipe, tmp_path)
    for text, reason in (("{", "Invalid JSON"), (Path(method.solver).read_text().replace("4.0", "null", 1), "number")):
        Path(method.solver).write_text(text)
        with pytest.raises(AccelError, match=f"solver.json is no fitted solver: .*{reason}"):
            method.load("-")


def test_another_model_a_second_model_and_a_student_are_refused(pipe, two_models, students, sample, tmp_path):
    method = fitted(pipe, tmp_path)
    with pytest.raises(AccelError, match="fitted to another model"), accel.apply(two_models, [method]):
        pass
    with pytest.raises(AccelError, match="do not go together"), accel.apply(pipe, [MeanFlow(steps=6), method]):
        pass
    pipe.transformer.proj_out.weight.data += 1
    with pytest.raises(AccelError, match="fitted to another model"), accel.apply(pipe, [method]):
        pass


def test_a_method_that_skips_calls_goes_inside(pipe, sample, tmp_path):
    file = tmp_path / "12.json"
    file.write_text(euler_as_fitted_solver(pipe, 12, range(12)).model_dump_json())
    method, caching = FittedSolver(steps=12, solver=str(file)), FasterCache(attention=False, guidance_start=0.2)
    with accel.apply(pipe, [caching, method]) as trace:
        assert sample(pipe, steps=12).isfinite().all()
    assert trace.summary()["calls"]["rebuild"] > 4
    with pytest.raises(AccelError, match="list it after methods that skip calls"), accel.apply(pipe, [method, caching]):
        sample(pipe, steps=12)


def test_a_missing_solver_names_the_command_that_fits_one(pipe):
    with (
        pytest.raises(AccelError, match="no solver of 8 steps at .*: `python -m accel fit` makes one"),
        accel.apply(pipe, [FittedSolver(steps=8)]),
    ):
        pass


def test_a_run_takes_the_step_count_of_the_solver_and_no_other_solver():
    defaults = ModelDefaults()
    settings = {"model": "", "prompt": "-", "methods": {"fittedsolver": {"steps": 8}}}
    assert build_run(defaults, **settings).steps == 8
    with pytest.raises(AccelError, match="steps = 50 is not possible"):
        build_run(defaults, **settings, steps=50)
    with pytest.raises(AccelError, match="brings its own noise levels"):
        build_run(defaults, **settings, solver="euler")
