"""The discriminator of the predictor's second stage, and its hinge loss."""

import pytest
import torch

from accel.training.discriminator import Discriminator, accuracy, hinge


def test_a_discriminator_gives_logits_for_every_layer_and_scale_of_each_sample_alone():
    torch.manual_seed(0)
    discriminator = Discriminator(24, 2)
    features = [torch.randn(3, 2 * 4 * 4, 24), 100 * torch.randn(3, 2 * 4 * 4, 24)]
    logits = discriminator(features, (2, 4, 4))
    assert [tuple(logit.shape) for logit in logits] == 2 * [(3, 32), (3, 8), (3, 2)]
    features[0][1:] *= 100  # the magnitude of one sample's features does not affect another's
    again = discriminator.eval()(features, (2, 4, 4))
    torch.testing.assert_close(again[0][0], discriminator([f[:1] for f in features], (2, 4, 4))[0][0])


def test_spectral_normalisation_bounds_every_layer_whatever_its_weights():
    torch.manual_seed(0)
    discriminator, features = Discriminator(24, 1), [torch.randn(2, 2 * 4 * 4, 24)]
    with torch.no_grad():
        for weight in discriminator.parameters():
            weight.mul_(100)
        for _ in range(20):  # the norm is estimated by power iteration, once a call
            discriminator(features, (2, 4, 4))
    for layer in discriminator.heads[0][::2]:
        assert torch.linalg.matrix_norm(layer.weight.flatten(1), 2).item() == pytest.approx(1, rel=0.02)


def test_hinge_is_zero_for_logits_beyond_one_on_the_correct_side():
    logits = [torch.tensor([[2.0, 0.5]]), torch.tensor([[-1.0]])]
    assert hinge(logits, True, torch.ones(1)).item() == pytest.approx((0.25 + 2) / 2)
    assert hinge(logits, False, torch.ones(1)).item() == pytest.approx((2.25 + 0) / 2)
    assert accuracy(logits, True, torch.ones(1)) == pytest.approx(2 / 3)


def test_hinge_and_accuracy_leave_out_samples_of_weight_zero():
    logits = [torch.tensor([[2.0, 0.5], [9.0, -9.0]])]
    assert hinge(logits, True, torch.tensor([1.0, 0.0])).item() == pytest.approx(0.25)
    assert hinge(logits, True, torch.zeros(2)).item() == 0
    assert accuracy(logits, True, torch.tensor([1.0, 0.0])) == 1
    assert accuracy(logits, True, torch.full((2,), 0.5)) == 0.75
