"""The discriminator of a predictor's second stage, and its loss."""

import pytest
import torch

from accel.training.discriminator import Discriminator, accuracy, hinge


def test_a_discriminator_sees_every_layer_at_every_scale():
    torch.manual_seed(0)
    judge = Discriminator(24, 2)
    features = [torch.randn(3, 2 * 4 * 4, 24), 100 * torch.randn(3, 2 * 4 * 4, 24)]
    logits = judge(features, (2, 4, 4))
    assert [tuple(own.shape) for own in logits] == 2 * [(3, 32), (3, 8), (3, 2)]
    features[0][1:] *= 100  # how large one sample's features are tells nothing on another's
    again = judge.eval()(features, (2, 4, 4))
    torch.testing.assert_close(again[0][0], judge([f[:1] for f in features], (2, 4, 4))[0][0])


def test_a_discriminator_cannot_be_steep_however_large_its_weights_are():
    torch.manual_seed(0)
    judge, features = Discriminator(24, 1), [torch.randn(2, 2 * 4 * 4, 24)]
    with torch.no_grad():
        for weight in judge.parameters():
            weight.mul_(100)
        for _ in range(20):  # the norm is estimated by power iteration, once a call
            judge(features, (2, 4, 4))
    for layer in judge.heads[0][::2]:
        assert torch.linalg.matrix_norm(layer.weight.flatten(1), 2).item() == pytest.approx(1, rel=0.02)


def test_hinge_wants_logits_beyond_one_on_the_right_side():
    logits = [torch.tensor([[2.0, 0.5]]), torch.tensor([[-1.0]])]
    assert hinge(logits, True, torch.ones(1)).item() == pytest.approx((0.25 + 2) / 2)
    assert hinge(logits, False, torch.ones(1)).item() == pytest.approx((2.25 + 0) / 2)
    assert accuracy(logits, True, torch.ones(1)) == pytest.approx(2 / 3)


def test_hinge_leaves_out_samples_that_do_not_count():
    logits = [torch.tensor([[2.0, 0.5], [9.0, -9.0]])]
    assert hinge(logits, True, torch.tensor([1.0, 0.0])).item() == pytest.approx(0.25)
    assert hinge(logits, True, torch.zeros(2)).item() == 0
    assert (
        accuracy(logits, True, torch.tensor([1.0, 0.0])) == 1 and accuracy(logits, True, torch.full((2,), 0.5)) == 0.75
    )
