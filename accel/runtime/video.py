"""Writes mp4 files that hold the settings of their run, and reads both back."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np

from ..errors import DISK_FULL, AccelError, explain_os_error
from ..files import unique_part

ENOUGH_BYTES = 2**20  # free on a disk that is not full


def write_mp4(path: Path, frames: np.ndarray, fps: int, settings: dict | None = None) -> float:
    """Write uint8 frames (f, h, w, c) as H.264 that browsers play; returns the seconds it took.

    Raises AccelError in one sentence if the file could not be written completely; nothing is left then.
    """
    import imageio.v2 as iio
    import imageio_ffmpeg

    find_ffmpeg()
    path, began = Path(path).absolute(), time.perf_counter()  # ffmpeg takes "a:b/c" for a protocol
    partial = unique_part(path.with_suffix(".mp4"))
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
            raise OSError(errno.ENOSPC, "the file is incomplete")
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:  # a broken pipe or a failed call: ffmpeg has ended
        raise AccelError(f"{path.name} could not be written: {_reason(error, path.parent)}") from error
    finally:
        partial.unlink(missing_ok=True)
    return time.perf_counter() - began


def _reason(error: OSError | RuntimeError, folder: Path) -> str:
    """Why ffmpeg failed. It tells no more than that it did, so the folder has to say."""
    if not folder.is_dir():
        return "its folder does not exist"
    if not os.access(folder, os.W_OK):
        return "its folder cannot be written to"
    if getattr(error, "errno", None) in DISK_FULL or shutil.disk_usage(folder).free < ENOUGH_BYTES:
        return "the disk is full"
    return "ffmpeg failed, the disk may be full"


@cache
def warm_encoder() -> None:
    """Encode one black frame: the encoder's first start in a process takes several times as long.

    Raises AccelError if there is no ffmpeg, or no place for temporary files.
    """
    try:
        with tempfile.TemporaryDirectory(prefix="accel-") as folder:
            write_mp4(Path(folder) / "warm.mp4", np.zeros((1, 16, 16, 3), np.uint8), 1)
    except OSError as error:
        raise AccelError(f"temporary files cannot be written: {explain_os_error(error, 'their folder')}") from error


def read_mp4(path: Path, width: int) -> np.ndarray:
    """Frames uint8 (f, h, w, c) of an mp4, shrunk by the largest whole factor that leaves `width` columns or more.

    So a video of that width has its own size again, which `write_mp4` has enlarged. Raises AccelError for a file that
    is no video.
    """
    import imageio.v3 as iio

    with readable(path):
        frames = np.stack(list(iio.imiter(path)))
    f, h, w, c = frames.shape
    k = max(1, min(w // width, h))
    blocks = frames[:, : h // k * k, : w // k * k].reshape(f, h // k, k, w // k, k, c)
    return blocks.mean((2, 4)).round().astype(np.uint8)


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Inside the context, errors of reading a video are one sentence. Raises AccelError."""
    try:
        yield
    except (OSError, RuntimeError, ValueError, StopIteration) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise AccelError(explain_os_error(error)) from error
        raise AccelError(f"{path} cannot be read as a video") from error


def read_settings(path: Path) -> dict:
    """The settings in an mp4 that `write_mp4` wrote. Raises AccelError if there are none."""
    if not os.path.isfile(path):
        raise AccelError(f"no file {path}")
    command = [find_ffmpeg(), "-v", "error", "-i", str(path.absolute()), "-f", "ffmetadata", "-"]
    text = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace").stdout
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


def find_ffmpeg() -> str:
    """The path of ffmpeg: the one of imageio-ffmpeg, or the system's. Raises AccelError if there is none."""
    import imageio_ffmpeg

    try:
        found = imageio_ffmpeg.get_ffmpeg_exe()
    except RuntimeError:
        found = ""
    if not shutil.which(found):  # the environment can name a file that does not exist
        raise AccelError("ffmpeg was not found: `pip install imageio-ffmpeg` brings one")
    return found


def _unescape(text: str):
    """Characters without their escapes: ffmetadata puts a backslash before = ; # \\ and line ends."""
    escaped = False
    for char in text:
        if char == "\\" and not escaped:
            escaped = True
        else:
            escaped = False
            yield char
