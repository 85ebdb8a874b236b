"""Scaling latents between the denoiser and the VAE."""

from types import SimpleNamespace

import torch

from accel.runtime.latents import denormalize, normalize

VAE = SimpleNamespace(config=SimpleNamespace(latents_mean=[1.0, -2.0], latents_std=[0.5, 4.0]))


def test_normalized_latents_have_mean_0_and_deviation_1_per_channel():
    z = torch.tensor([1.5, 2.0]).view(1, 2, 1, 1, 1)  # one deviation above the mean of each channel
    assert normalize(VAE, z).flatten().tolist() == [1.0, 1.0]


def test_denormalize_is_the_inverse_and_keeps_the_dtype():
    z = torch.randn(1, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(denormalize(VAE, normalize(VAE, z)), z)
    assert denormalize(VAE, z.bfloat16()).dtype == torch.bfloat16
