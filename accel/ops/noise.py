"""How noisy latents are."""

from __future__ import annotations

import math

MAX_LOG_SNR = math.log(1000)  # beyond, a step counts as one without any noise, or without any signal


def log_snr(signal: float, noise: float) -> float:
    """Log of the signal-to-noise ratio, of the two scales; between -log 1000 and log 1000."""
    value = math.log(max(signal, 1e-9) / max(noise, 1e-9))
    return max(-MAX_LOG_SNR, min(value, MAX_LOG_SNR))
