"""Fitting a solver: the least-squares problem, the spacing of its steps, and a whole fit to a small random model."""

import sys
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchHeunDiscreteScheduler

from accel.errors import AccelError
from accel.evaluation import solver_fit
from accel.evaluation.solver_fit import (
    SPACINGS,
    Rollouts,
    check_pipeline,
    fit,
    fit_weights,
    record,
    run_fit,
    save,
    search,
    spacing,
    uncond_steps,
)
from accel.families import family_of
from accel.runtime.generate import generate, grid, warm_up
from accel.runtime.models import model_defaults
from accel.runtime.run import build_run

sys.path.append(str(Path(__file__).parents[1] / "families"))
from tiny import TINY, encoding  # noqa: E402

FITTED = [
    "wan", "hunyuan_video", *(pytest.param(name, marks=pytest.mark.slow) for name in ("skyreels_v2", "ltx", "mochi"))
]  # fmt: skip
STEPS = 12


def run_of(pipe, **settings):
    frames = 17 if "LTX" in type(pipe).__name__ else 13
    settings = {"prompt": "a cat", "height": 64, "width": 64, "frames": frames, **settings}
    return build_run(model_defaults(pipe, "-"), model="-", **settings)


def paths_of(pipe, n: int = 3):
    runs = [run_of(pipe, steps=STEPS, seed=seed) for seed in range(n)]
    defaults = model_defaults(pipe, "-")
    warm_up(runs[0], pipe, defaults)
    return [record(run, pipe, defaults) for run in runs], runs[0]


def test_the_weights_that_made_the_targets_are_found():
    generator = torch.Generator().manual_seed(0)
    terms = [[torch.randn(5, 40, generator=generator) for _ in range(3)] for _ in range(2)]
    targets = [2 * a - b + 0.5 * c for a, b, c in terms]
    assert fit_weights(terms, targets) == pytest.approx([2, -1, 0.5], abs=1e-4)


def test_one_prompt_that_no_weight_fits_does_not_decide_over_the_others():
    """Least squares would give 608 / 408: two terms are their targets, and a much larger third one is not."""
    terms = [[torch.ones(4)], [torch.ones(4)], [10 * torch.tensor([1.0, 1.0, 1.0, -1.0])]]
    targets = [torch.ones(4), torch.ones(4), 10 * torch.tensor([4.0, 4.0, -2.0, 0.0])]
    assert fit_weights(terms, targets) == pytest.approx([1], abs=0.01)


def test_a_spacing_is_denser_at_the_ends_and_takes_each_step_once():
    assert spacing(12, 3, 1000.0, 1.0, 1) == (0, 4, 8, 12)
    assert spacing(30, 3, 1.0, 0.5, 1) == (0, 10, 20, 30)  # gaps 1, 1.5 * 0.75 and 2 * 0.5: 9.6, 20.4
    assert spacing(4, 3, 0.01, 0.01, 1) == (0, 1, 3, 4)
    for shape in SPACINGS:
        for count in range(1, 50):
            nodes = spacing(50, count, *shape)
            assert len(set(nodes)) == count + 1 and sorted(nodes) == list(nodes) and nodes[0] == 0 and nodes[-1] == 50


def test_unconditional_steps_are_spread_from_the_first_to_the_last():
    assert uncond_steps(12, 1.0) == list(range(12))
    assert uncond_steps(9, 0.5) == [0, 3, 5, 8] and uncond_steps(5, 0) == []


@pytest.mark.parametrize("name", FITTED)
def test_a_run_with_a_fitted_solver_ends_where_the_fit_ended(name, tmp_path):
    """The pipeline, with the method in it, repeats the rollout that the weights were fitted on."""
    pipe = encoding(name)
    paths, run = paths_of(pipe)
    levels, times = solver_fit.noise_levels(pipe.scheduler), pipe.scheduler.timesteps.tolist()
    solver, errors = fit(check_pipeline(pipe), paths, levels, times, 6, 0.5, run.guidance)
    guided = name != "hunyuan_video"
    assert solver.uncond_steps == ([0, 2, 5] if guided else []) and min(errors.values()) < -1
    (file,) = save(solver, "-", tmp_path)
    fitted = run_of(pipe, methods={"fittedsolver": {"steps": 6, "solver": str(file)}}, seed=1)
    video = generate(fitted, pipe, model_defaults(pipe, "-"))
    assert len([e for e in video.trace.events.values() if e.action == "compute" and e.layer == "denoiser"]) == (
        9 if guided else 6
    )
    nodes = [levels.index(sigma) for sigma in solver.sigmas]
    rollouts = Rollouts(check_pipeline(pipe), paths, solver.uncond_steps)
    arrived = rollouts.after(tuple(nodes))
    assert arrived.weights == solver.weights
    assert rollouts.error(tuple(nodes)) == pytest.approx(min(errors.values()), abs=1e-3)
    end = family_of(pipe).to_video(arrived.samples[1], grid(pipe, fitted))
    torch.testing.assert_close(video.latents.float(), end, rtol=1e-4, atol=1e-4)


def test_a_search_keeps_the_best_list_and_computes_only_what_differs(monkeypatch):
    pipe = encoding("wan")
    paths, _ = paths_of(pipe, 2)
    rollouts, calls = Rollouts(check_pipeline(pipe), paths, [0, 1, 2, 3]), []
    stock = solver_fit._outputs
    monkeypatch.setattr(solver_fit, "_outputs", lambda *given: calls.append(given[3]) or stock(*given))
    start = (0, 3, 6, 9, 12)
    before = rollouts.error(start)
    assert calls == [0, 0, 3, 3, 6, 6, 9, 9]
    calls.clear()
    rollouts.error((0, 3, 6, 10, 12))
    assert calls == [10, 10]
    found = search(rollouts, start, 12)
    assert rollouts.error(found) < before and found == search(rollouts, start, 12)
    assert all(found[: len(known)] == known for known in rollouts.known)


def test_a_search_ends_where_nothing_can_be_moved():
    pipe = encoding("wan")
    paths, _ = paths_of(pipe, 1)
    every = tuple(range(STEPS + 1))
    assert search(Rollouts(check_pipeline(pipe), paths, []), every, 3) == every


def test_the_trajectory_holds_what_the_pipeline_computed():
    pipe = encoding("wan")
    (path,), run = paths_of(pipe, 1)
    assert len(path.samples) == STEPS + 1 and [len(calls) for calls in path.calls] == [2] * STEPS
    video = generate(run, pipe, model_defaults(pipe, "-"))
    torch.testing.assert_close(path.samples[-1], video.latents)
    cond, uncond = solver_fit._outputs(pipe.transformer, path, path.samples[0], 0, 2)
    again = [pipe.transformer(**{**c, "hidden_states": path.samples[0]})[0] for c in path.calls[0]]
    torch.testing.assert_close(torch.stack([cond, uncond]), torch.stack(again))


def test_a_call_that_counts_flops_is_not_one_of_the_trajectory():
    """Mochi's FLOPs depend on the text's length, and are counted by a call of the model at each new one."""
    pipe = encoding("mochi")
    path = record(run_of(pipe, steps=STEPS), pipe, model_defaults(pipe, "-"))
    assert [len(calls) for calls in path.calls] == [2] * STEPS and len(path.first) == 2


def test_what_no_solver_can_be_fitted_to_is_refused(monkeypatch, two_models):
    pipe, _ = TINY["cogvideox"]()
    for refused in (pipe, two_models):
        with pytest.raises(AccelError, match="it needs one transformer and a scheduler for flow matching"):
            check_pipeline(refused)
    wan = encoding("wan")
    wan.scheduler = FlowMatchHeunDiscreteScheduler(shift=3.0)
    with pytest.raises(AccelError, match="the scheduler evaluates 23 times in 12 steps"):
        paths_of(wan, 1)


def test_step_counts_that_the_method_lacks_or_the_baseline_has_are_refused(monkeypatch, tmp_path):
    wan = encoding("wan")
    monkeypatch.setattr(solver_fit, "load_pipeline", lambda _: wan)
    with pytest.raises(AccelError, match="no solver has 9 steps: choose from 4, 5, 6"):
        run_fit("-", [8, 9], 1.0, None, 1, 0, tmp_path)
    monkeypatch.setattr(
        solver_fit, "model_defaults", lambda *_: model_defaults(wan, "-").model_copy(update={"steps": 12})
    )
    with pytest.raises(AccelError, match="a solver of 16 steps saves nothing: the baseline has 12"):
        run_fit("-", [8, 16], 1.0, None, 1, 0, tmp_path)
    assert not list(tmp_path.iterdir())


def test_nothing_is_left_in_the_pipeline_after_a_fit():
    pipe = encoding("wan")
    before = generate(run_of(pipe, steps=4), pipe, model_defaults(pipe, "-")).latents
    paths_of(pipe, 1)
    assert "step" not in vars(pipe.scheduler) and not pipe.transformer._forward_hooks
    assert torch.equal(generate(run_of(pipe, steps=4), pipe, model_defaults(pipe, "-")).latents, before)
