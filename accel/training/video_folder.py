"""A folder of captioned videos from which trajectories start, so that a student sees more than its model's samples."""

from __future__ import annotations

import random
from itertools import islice
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import AccelError, amount
from ..runtime.latents import normalize
from ..runtime.models import ModelDefaults
from ..runtime.video import readable
from ..world.captions import read_captions
from .tasks.vae import to_unit


class VideoFolder:
    """Videos of a folder with `captions.json`, {file: caption}, as written by `accel world sample`."""

    def __init__(self, folder: Path, pipe, defaults: ModelDefaults):
        """Raises AccelError if there are no captions, or if a video that they name is missing."""
        self.captions = read_captions(folder)
        self.folder, self.vae = folder, pipe.vae
        self.shape = (defaults.frames, defaults.height, defaults.width)

    def draw(self, rng: random.Random) -> tuple[str, Tensor]:
        """A random caption, and normalised latents (c, f, h, w) of its video's first frames at the model's size.

        Raises AccelError for a video that is too short or cannot be read.
        """
        name = rng.choice(sorted(self.captions))
        f, *size = self.shape
        with readable(self.folder / name):
            first = list(islice(iio.imiter(self.folder / name), f))  # a whole video may take gigabytes
        frames = torch.from_numpy(np.stack(first))[..., :3]
        if len(frames) < f:
            raise AccelError(f"{self.folder / name} has {amount(len(frames), 'frame')}, {f} are needed")
        x = F.interpolate(to_unit(frames).transpose(0, 1), size, mode="bilinear", antialias=True).transpose(0, 1)
        with torch.no_grad():
            z = self.vae.encode(x[None].to(self.vae.device, self.vae.dtype)).latent_dist.mode()
        return self.captions[name], normalize(self.vae, z).float()[0]
