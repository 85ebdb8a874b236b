"""Pictures of a video while it denoises: its first frame at one step, or a sheet of them with the time of each."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from PIL import Image

from ..core.calls import synchronized_time
from ..core.trace import Trace
from .latents import denormalize

MAX_PREVIEWS = 64  # on a sheet,
MAX_WIDTH = 128  # pixels of one of them
COLUMNS = 8
BATCH = 8  # previews decoded at once
ROUGH = 8  # pixels of a latent in a rough picture


@dataclass(frozen=True)
class Race:
    """How a video denoised: a sheet of previews, and the denoising second at which each was reached."""

    sheet: bytes  # JPEG, row by row
    steps: list[int]  # steps done at each preview; the last preview is of the last step
    times: list[float]
    total: float  # seconds of denoising
    columns: int
    width: int  # of one preview
    height: int

    def to_json(self) -> dict:
        """Everything but the sheet, with the number of previews as `frames`."""
        values = asdict(self)
        del values["sheet"]
        return {**values, "times": [round(t, 4) for t in self.times], "frames": len(self.times)}


class RaceRecorder:
    """A step callback of `generate` that keeps first latent frames and their times; `on_step` is called within it.

    Nothing is decoded before `finish`, so that recording costs a run no time. The time of `on_step` is not counted.
    """

    def __init__(self, steps: int, on_step: Callable[[int, Trace, torch.Tensor], None] | None = None):
        self._wanted, self._on_step, self._paused = preview_steps(steps), on_step, 0.0
        self._steps: list[int] = []
        self._times: list[float] = []
        self._latents: list[torch.Tensor] = []

    def __call__(self, done: int, trace: Trace, latents: torch.Tensor) -> None:
        """Keep what a preview needs if this step has one."""
        now = synchronized_time(latents.device)
        if done in self._wanted:
            self._steps.append(done)
            self._times.append(now - trace.started - self._paused)
            self._latents.append(latents[:, :, :1].clone())
        if self._on_step:
            self._on_step(done, trace, latents)
        self._paused += synchronized_time(latents.device) - now

    def finish(self, pipe, total: float) -> Race | None:
        """The race of a finished run that denoised for `total` seconds; None if no step was seen."""
        if not self._steps:
            return None
        pictures = [picture for i in range(0, len(self._latents), BATCH)
                    for picture in _pictures(pipe, torch.cat(self._latents[i : i + BATCH]))]  # fmt: skip
        sheet, (width, height) = _sheet(pictures), pictures[0].size
        return Race(sheet, self._steps, self._times, round(total, 4), COLUMNS, width, height)


def preview_steps(steps: int) -> set[int]:
    """The steps (1 to `steps`) that have a preview: all, or `MAX_PREVIEWS` at even distances, with the last."""
    count = min(steps, MAX_PREVIEWS)
    return {(i + 1) * steps // count for i in range(count)}


def preview_image(pipe, latents: torch.Tensor) -> str:
    """The first frame of latents (1, c, f, h, w) as a PNG in a data URI."""
    (picture,) = (Image.fromarray(frame) for frame in _first_frames(pipe, latents))
    return "data:image/png;base64," + base64.b64encode(_encoded(picture, "PNG")).decode()


@torch.no_grad()
def _first_frames(pipe, latents: torch.Tensor) -> np.ndarray:
    """First frames uint8 (b, h, w, c) of latents (b, c, f, h, w), as far as they can be had at little cost.

    Wan's autoencoder decodes one latent frame on its own. For others it is a rough picture: three of the channels.
    """
    if not isinstance(pipe.vae, AutoencoderKLWan):
        rough = latents[:, :3, 0].float().repeat_interleave(ROUGH, -1).repeat_interleave(ROUGH, -2)
        low, high = rough.amin((1, 2, 3), keepdim=True), rough.amax((1, 2, 3), keepdim=True)
        return (255 * (rough - low) / (high - low + 1e-6)).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    z = denormalize(pipe.vae, latents[:, :, :1]).to(pipe.vae.dtype)
    frames = pipe.vae.decode(z).sample[:, :, 0]
    return ((frames.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def _pictures(pipe, latents: torch.Tensor) -> list[Image.Image]:
    """First frames of latents (b, c, 1, h, w), at most `MAX_WIDTH` wide."""
    pictures = [Image.fromarray(frame) for frame in _first_frames(pipe, latents)]
    width, height = pictures[0].size
    if width > MAX_WIDTH:
        size = (MAX_WIDTH, max(1, round(height * MAX_WIDTH / width)))
        pictures = [picture.resize(size, Image.Resampling.BOX) for picture in pictures]
    return pictures


def _sheet(pictures: list[Image.Image]) -> bytes:
    """Pictures of one size in rows of `COLUMNS`, as a JPEG."""
    width, height = pictures[0].size
    sheet = Image.new("RGB", (COLUMNS * width, -(-len(pictures) // COLUMNS) * height))
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (i % COLUMNS * width, i // COLUMNS * height))
    return _encoded(sheet, "JPEG", quality=85)


def _encoded(picture: Image.Image, kind: str, **options) -> bytes:
    data = io.BytesIO()
    picture.save(data, kind, **options)
    return data.getvalue()
