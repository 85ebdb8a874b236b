"""How far two videos are apart: PSNR and SSIM of raw frames (scikit-image), bit-equality, motion and fine detail."""

from __future__ import annotations

import numpy as np
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from ..ops.spectrum import high_energy

RATIOS = {  # of a video to another one of the same noise
    "latent_nmse": "squared error of the final latents, in parts of the other's mean square",
    "motion_ratio": "mean change from frame to frame",
    "spatial_hf": "energy of the latents' high spatial frequencies",
    "temporal_hf": "energy of the latents' high temporal frequencies",
}


def distance(a: np.ndarray, b: np.ndarray) -> dict:
    """PSNR (dB, None if equal), SSIM mean, worst and per frame, of uint8 frames (f, h, w, c)."""
    if a.shape != b.shape:
        raise ValueError(f"videos of shapes {a.shape} and {b.shape} cannot be compared")
    equal = bool(np.array_equal(a, b))
    ssim = [float(structural_similarity(x, y, channel_axis=-1, data_range=255)) for x, y in zip(a, b)]
    return {
        "bit_equal": equal,
        "psnr": None if equal else float(peak_signal_noise_ratio(a, b, data_range=255)),
        "ssim": float(np.mean(ssim)),
        "ssim_worst": min(ssim),
        "ssim_frames": [round(s, 5) for s in ssim],
    }


def relative_metrics(
    plain: tuple[torch.Tensor, np.ndarray], other: tuple[torch.Tensor, np.ndarray]
) -> dict[str, float]:
    """The `RATIOS` of another video to a plain one; each is its latents (1, c, f, h, w) and frames (f, h, w, c)."""
    (x, frames_x), (y, frames_y) = plain, other
    x, y = x.float(), y.float()
    change = [np.abs(np.diff(frames.astype(np.float32), axis=0)).mean() for frames in (frames_x, frames_y)]
    high = [band_y / band_x for band_x, band_y in zip(high_energy(x), high_energy(y))]
    values = ((x - y).square().mean() / x.square().mean(), change[1] / change[0], *high)
    return {name: float(value) for name, value in zip(RATIOS, values, strict=True)}
