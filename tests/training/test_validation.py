"""Validation of a predictor: errors at the end of each run of predicted steps, and of the final latents."""

import pytest
import torch
from support import PREDICTOR_STEPS as STEPS
from support import predictor_task

from accel.methods.disca.disca import select_full_steps
from accel.training.validation import CachedRolloutValidator


def test_a_rollout_of_full_steps_has_no_error_and_one_with_reuse_has(pipe):
    task = predictor_task(pipe)
    assert CachedRolloutValidator(task, ["a"], list(range(STEPS))).final_latent_error(task.module, 1) == 0
    cached = CachedRolloutValidator(task, ["a"], select_full_steps(3, STEPS))
    assert cached.final_latent_error(task.module, 1) > 0 and cached.error(task.module, 1) > 0


def test_errors_are_taken_after_each_run_of_predicted_steps_with_the_feature_of_its_full_step(pipe, monkeypatch):
    task, predicted = predictor_task(pipe), []
    validator = CachedRolloutValidator(task, ["a"], [0, 1, 4])  # predicted steps: 2 and 3, then 5
    states, full_inputs = validator.states, {}

    def full_forward(x, i):
        full_inputs[i] = x
        v = (states[i + 1] - states[i]) / (task.context.sigmas[i + 1] - task.context.sigmas[i]).float()
        return v, torch.full((1, 12, 24), float(i))

    def predicted_forward(model, cached, full, x, i):
        assert cached.unique().item() == full
        predicted.append((i, full))
        return full_forward(states[i], i)[0] * (1.1 if i == 3 else 1)

    monkeypatch.setattr(validator, "_full_forward", full_forward)
    monkeypatch.setattr(validator, "_predicted_forward", predicted_forward)
    last = states[4] - states[3]
    expected = (0.1 * last).square().mean() / (states[4] - states[1]).square().mean() / 2
    assert validator.error(task.module, 1) == pytest.approx(expected.item(), rel=1e-3)
    assert predicted == [(2, 1), (3, 1), (5, 4)]
    assert torch.equal(full_inputs[1], states[1]) and torch.equal(full_inputs[4], states[4])
