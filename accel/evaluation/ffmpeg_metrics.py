"""VMAF and XPSNR, perceptual metrics of two videos, measured by the ffmpeg that writes the mp4 files."""

from __future__ import annotations

import os
import re
import subprocess

import numpy as np

from ..errors import AccelError
from ..runtime.video import find_ffmpeg

MIN_SIZE = 192  # pixels: VMAF was trained on large frames, so smaller ones are enlarged by whole numbers


def vmaf(reference: np.ndarray, frames: np.ndarray) -> float | None:
    """VMAF of uint8 frames (f, h, w, c) against a reference, 0 to 100; equal videos have 97 to 100.

    None where ffmpeg is missing or has no VMAF. For 17 frames of 64x64 it takes 0.06 s of CPU time, 0.1 s in all.
    """
    metric = f"[video][reference]libvmaf=n_threads={min(4, os.cpu_count() or 1)}"
    return _score(reference, frames, metric, rb"VMAF score: ([\d.]+)")


def xpsnr(reference: np.ndarray, frames: np.ndarray) -> float | None:
    """XPSNR in dB of the luma of uint8 frames (f, h, w, c): errors count less where texture or motion hides them.

    Texture and motion are the reference's. None for equal videos, and where ffmpeg is missing or has no XPSNR.
    """
    return _score(reference, frames, "[reference][video]xpsnr", rb"XPSNR +y: (-?[\d.]+)")


def enlargement(frames: np.ndarray) -> int:
    """The whole number by which frames (f, h, w, c) are enlarged, so that their shorter side has `MIN_SIZE` pixels."""
    return -(-MIN_SIZE // min(frames.shape[1:3]))


def _score(reference: np.ndarray, frames: np.ndarray, metric: str, pattern: bytes) -> float | None:
    """What a filter of ffmpeg reports of two inputs, `[video]` and `[reference]` in its own order; None: no number."""
    try:
        graph = _graph(reference, metric)
        command = [find_ffmpeg(), "-hide_banner", "-nostats", *_input(reference), "-filter_complex", graph]
        done = subprocess.run([*command, "-f", "null", "-"], input=_stack(reference, frames), capture_output=True)
    except (AccelError, OSError):
        return None
    found = re.search(pattern, done.stderr)
    return float(found[1]) if found else None


def _stack(reference: np.ndarray, frames: np.ndarray) -> bytes:
    """Both videos as one, the reference on top: ffmpeg has one standard input."""
    return np.concatenate([reference, frames], 1).tobytes()


def _input(reference: np.ndarray) -> list[str]:
    height, width = reference.shape[1:3]
    return ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{2 * height}", "-r", "8", "-i", "-"]


def _graph(reference: np.ndarray, metric: str) -> str:
    """Enlarge the stacked video, cut it in two and compare the halves; `metric` begins with its two inputs."""
    (height, width), times = reference.shape[1:3], enlargement(reference)
    half = f"crop={width * times}:{height * times}:0"
    return (
        f"[0:v]scale={width * times}:{2 * height * times}:flags=neighbor,format=yuv444p,split[x][y];"
        f"[x]{half}:0[reference];[y]{half}:{height * times}[video];{metric}"
    )
