"""How the shipped weights are made: `python -m accel train ...`. Nothing but the command line imports this."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch

from ..models import ROOT, TINY

# The small setting is for CPUs, the large one for a GPU; same code, same layout.
SETTINGS = {
    "small": {"size": 64, "frames": 17, "fps": 8, "clips": 8_000},
    "large": {"size": 96, "frames": 33, "fps": 12, "clips": 40_000},
}
RECIPES = {
    "small": {
        "vae": {"steps": 6500, "lr": 1.2e-3, "decay_from": 0.6},
        "base": {"steps": 2700, "lr": 1.4e-3, "betas": (0.9, 0.98)},
    },
    "large": {
        "vae": {"steps": 12_000, "lr": 1.2e-3, "decay_from": 0.6},
        "base": {"steps": 30_000, "lr": 1e-3, "betas": (0.9, 0.98)},
    },
}
PARTS = ("vae", "base")


def train_parts(what: str, minutes: float | None, resume: bool, out: Path) -> dict:
    """Train a part, or all of them in order, and write what is finished into `models/tiny-wan`."""
    if what not in (*PARTS, "all"):
        raise ValueError(f"unknown part {what!r}; there are {', '.join(PARTS)} and all")
    setting = "large" if torch.cuda.is_available() else "small"
    done = {part: _train(part, setting, minutes, resume, out) for part in (PARTS if what == "all" else (what,))}
    return {"setting": setting, **done}


def _train(part: str, setting: str, minutes: float | None, resume: bool, out: Path) -> dict:
    from diffusers import AutoencoderKLWan

    from . import base, vae
    from .fit import Recipe, fit

    shape, target = SETTINGS[setting], ROOT / TINY
    recipe = Recipe(**RECIPES[setting][part])
    if part == "vae":
        task = vae.VaeTask(recipe, shape["size"], shape["frames"])
        summary = fit(task, out / "vae", minutes=minutes, resume=resume)
        return {**summary, **vae.finish(task, target / "vae")}
    if not (target / "vae" / "config.json").is_file():
        raise ValueError("the autoencoder comes first: python -m accel train vae")
    autoencoder = AutoencoderKLWan.from_pretrained(target / "vae")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    compiled = device == "cuda" or shutil.which("g++") is not None
    sizes = (shape["size"], shape["frames"], shape["clips"])
    task = base.BaseTask(recipe, autoencoder, *sizes, out / "base", device, compiled)
    summary = fit(task, out / "base", minutes=minutes, resume=resume)
    base.finish(task, target)
    home = {"height": shape["size"], "width": shape["size"], "frames": shape["frames"], "fps": shape["fps"]}
    home |= {"steps": 50, "guidance": 4.0, "text_length": base.TEXT, "captions": True}
    (target / "accel.json").write_text(json.dumps(home, indent=1) + "\n")
    return summary
