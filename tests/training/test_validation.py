"""Looks at a predictor in training: where stretches between anchors end, and the final latents."""

import pytest
import torch
from support import PREDICTOR_STEPS as STEPS
from support import predictor_task as task

from accel.methods.disca.disca import select_full_steps
from accel.training.validation import CachedRolloutValidator


def test_all_anchors_end_where_the_student_ends_and_reuse_does_not(pipe):
    learn = task(pipe)
    assert CachedRolloutValidator(learn, ["a"], list(range(STEPS))).end(learn.module, 1) == 0
    some = CachedRolloutValidator(learn, ["a"], select_full_steps(3, STEPS))
    assert some.end(learn.module, 1) > 0 and some.jump(learn.module, 1) > 0


def test_looks_are_at_where_each_stretch_between_anchors_ends_by_the_feature_of_its_anchor(pipe, monkeypatch):
    learn, seen = task(pipe), []
    held = CachedRolloutValidator(learn, ["a"], [0, 1, 4])  # stretches of three steps and of two
    ways, passes = held.ways, {}

    def whole(x, i):
        passes[i] = x
        v = (ways[i + 1] - ways[i]) / (learn.context.levels[i + 1] - learn.context.levels[i]).float()
        return v, torch.full((1, 12, 24), float(i))

    def predicted(model, cached, x, i):
        seen.append((i, cached.unique().item()))
        return whole(ways[i], i)[0] * (1.1 if i == 3 else 1)

    monkeypatch.setattr(held, "_whole", whole)
    monkeypatch.setattr(held, "_predicted", predicted)
    short = ways[4] - ways[3]
    expected = (0.1 * short).square().mean() / (ways[4] - ways[1]).square().mean() / 2
    assert held.jump(learn.module, 1) == pytest.approx(expected.item(), rel=1e-3)
    assert seen == [(2, 1), (3, 1), (5, 4)] and torch.equal(passes[1], ways[1]) and torch.equal(passes[4], ways[4])
