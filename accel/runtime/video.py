"""Writes mp4 files that hold the settings of their run, and reads the settings back."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import time
from functools import cache
from pathlib import Path

import numpy as np

from ..errors import AccelError


def write_mp4(path: Path, frames: np.ndarray, fps: int, settings: dict | None = None) -> float:
    """Write uint8 frames (f, h, w, c) as H.264 that browsers play; returns the seconds it took.

    Raises OSError if the file could not be written completely; nothing is left then.
    """
    import imageio.v2 as iio
    import imageio_ffmpeg

    began, partial = time.perf_counter(), Path(path).with_suffix(".part.mp4")
    comment = ["-metadata", "comment=" + json.dumps(settings)] if settings else []
    size = max(1, 256 // frames.shape[2])  # small frames are enlarged, without smoothing
    big = frames.repeat(size, axis=1).repeat(size, axis=2)
    try:
        with iio.get_writer(
            partial, fps=fps, codec="libx264", pixelformat="yuv420p", quality=None, macro_block_size=2,
            output_params=["-crf", "12", "-preset", "veryfast", "-movflags", "+faststart", *comment],
        ) as writer:  # fmt: skip
            for frame in big:
                writer.append_data(frame)
        if imageio_ffmpeg.count_frames_and_secs(str(partial))[0] != len(frames):  # ffmpeg does not report it
            raise OSError("the file is incomplete, the disk may be full")
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:
        raise OSError(f"{path} could not be written: {str(error).splitlines()[0]}") from None
    finally:
        partial.unlink(missing_ok=True)
    return time.perf_counter() - began


@cache
def warm_encoder() -> None:
    """Encode one black frame: the encoder's first start in a process takes several times as long."""
    with tempfile.TemporaryDirectory(prefix="accel-") as folder:
        write_mp4(Path(folder) / "warm.mp4", np.zeros((1, 16, 16, 3), np.uint8), 1)


def read_settings(path: Path) -> dict:
    """The settings in an mp4 that `write_mp4` wrote. Raises AccelError if there are none."""
    if not os.path.isfile(path):
        raise AccelError(f"no file {path}")
    command = [_ffmpeg(), "-v", "error", "-i", str(path), "-f", "ffmetadata", "-"]
    text = subprocess.run(command, capture_output=True, text=True).stdout
    unescaped = "".join(_unescape(text))
    for line in unescaped.splitlines():
        if line.startswith("comment="):
            try:
                settings = json.loads(line.removeprefix("comment="))
            except json.JSONDecodeError:
                break
            if isinstance(settings, dict):
                return settings
    raise AccelError(f"{path} holds no settings; only videos made by `python -m accel` do")


def _ffmpeg() -> str:
    import imageio_ffmpeg

    try:
        return imageio_ffmpeg.get_ffmpeg_exe()
    except RuntimeError:
        raise OSError("ffmpeg was not found; `pip install imageio-ffmpeg` brings one") from None


def _unescape(text: str):
    """Characters without their escapes: ffmetadata puts a backslash before = ; # \\ and line ends."""
    escaped = False
    for char in text:
        if char == "\\" and not escaped:
            escaped = True
        else:
            escaped = False
            yield char
