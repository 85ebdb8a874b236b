"""Latents of a VAE in its own scale and in the scale of the denoiser: mean 0 and deviation 1 per channel."""

from __future__ import annotations

import torch
from torch import Tensor


def normalize(vae, z: Tensor) -> Tensor:
    """Latents (b, c, f, h, w) as the denoiser takes them, from what the encoder gives."""
    mean, std = _statistics(vae, z)
    return (z - mean) / std


def denormalize(vae, z: Tensor) -> Tensor:
    """Latents (b, c, f, h, w) as the decoder takes them, from what the denoiser gives."""
    mean, std = _statistics(vae, z)
    return z * std + mean


def _statistics(vae, like: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (1, c, 1, 1, 1) of each latent channel, with the dtype and device of `like`."""
    config = vae.config
    return tuple(torch.tensor(v).view(1, -1, 1, 1, 1).to(like) for v in (config.latents_mean, config.latents_std))
