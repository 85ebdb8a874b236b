"""ColorVideoVDP and LPIPS of two videos, by their own packages: `pip install cvvdp lpips`.

Both packages need torchvision. LPIPS downloads the weights of AlexNet once.
"""

from __future__ import annotations

import warnings
from functools import cache

import numpy as np
import torch

from ..errors import AccelError
from .ffmpeg_metrics import enlargement

DISPLAY = "standard_fhd"  # 24 inches, 1920x1080 pixels, seen from 0.6 m


def cvvdp(reference: np.ndarray, frames: np.ndarray, fps: float) -> float:
    """ColorVideoVDP in just-objectionable differences of uint8 frames (f, h, w, c) to a reference; 10: none is seen.

    Mantiuk et al., "ColorVideoVDP" (arXiv 2401.11485). Small frames are seen enlarged, as on the page.
    """
    test, true = _enlarged(frames), _enlarged(reference)
    return float(_cvvdp().predict(test, true, dim_order="FHWC", frames_per_second=fps)[0])


def lpips(reference: np.ndarray, frames: np.ndarray) -> float:
    """LPIPS with AlexNet of uint8 frames (f, h, w, c) to a reference, mean of the frames; 0 for equal ones.

    Zhang et al., "The Unreasonable Effectiveness of Deep Features" (arXiv 1801.03924). Raises AccelError if AlexNet's
    weights cannot be downloaded.
    """
    network = _lpips()
    scaled = [torch.from_numpy(_enlarged(x)).permute(0, 3, 1, 2) / 127.5 - 1 for x in (reference, frames)]
    with torch.no_grad():
        return float(torch.stack([network(x[None], y[None]) for x, y in zip(*scaled, strict=True)]).mean())


def _enlarged(frames: np.ndarray) -> np.ndarray:
    """Frames (f, h, w, c) as large as VMAF sees them: these metrics were fitted to photographs."""
    times = enlargement(frames)
    return frames.repeat(times, 1).repeat(times, 2)


@cache
def _cvvdp():
    import pycvvdp

    return pycvvdp.cvvdp(display_name=DISPLAY, device=torch.device("cpu"), quiet=True)


@cache
def _lpips() -> torch.nn.Module:
    from lpips import LPIPS

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torchvision's, about its own arguments
            return LPIPS(net="alex", verbose=False).eval()
    except OSError as error:
        raise AccelError(f"LPIPS needs the weights of AlexNet, which could not be downloaded ({error})") from error
