"""What is trained at which size, and the optimizer settings of each part."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import AccelError

STUDENTS = ("gpd", "meanflow", "predictor")  # trained from a finished base model
PARTS = ("vae", "base", *STUDENTS)


@dataclass(frozen=True)
class ModelSetting:
    """The shipped model for one kind of device: the size of its videos, and its data."""

    size: int  # height and width in pixels
    frames: int
    fps: int
    clips: int  # rendered for the base model
    save_every: float  # seconds between checkpoints
    guidance: float = 5.0  # that the model runs with by default, and its students learn


def check_part(what: str) -> None:
    """Raise AccelError for what is neither one of the parts nor "all" of them."""
    if what not in (*PARTS, "all"):
        raise AccelError(f"unknown part {what!r}; there are {', '.join(PARTS)} and all")


SETTINGS = {
    "small": ModelSetting(96, 17, fps=8, clips=12_000, save_every=600),  # for a CPU; its sample grid takes a while
    "large": ModelSetting(96, 17, fps=8, clips=24_000, save_every=120),  # for a GPU
}
_STUDENT = {"warmup": 10, "decay_from": 0.0, "weight_decay": 0.0, "ema": 0.0}  # stages are too short for an average
# By setting, then by part; "others" are models outside the toy world. A run that goes on from weights needs another
# seed than the run before: with the same it would see the same captions and noise again.
OPTIM_CONFIGS = {
    "small": {
        "vae": {"steps": 800, "lr": 6e-4, "matrix_lr": 3e-3, "warmup": 40, "decay_from": 0.4, "seed": 2},
        "base": {"steps": 6400, "lr": 1e-3, "matrix_lr": 4e-3, "warmup": 40, "decay_from": 0.45, "betas": (0.9, 0.98),
                 "seed": 9},
        "gpd": {"steps": 12, "lr": 3e-4, "matrix_lr": 1e-3, "seed": 1} | _STUDENT,
        "meanflow": {"steps": 60, "lr": 3e-4, "matrix_lr": 1e-3} | _STUDENT | {"ema": 0.98},
        "predictor": {"steps": 150, "lr": 1e-3, "matrix_lr": 3e-3} | _STUDENT | {"ema": 0.98},
    },
    "large": {  # 7 minutes of one GPU, besides encoding the clips and compiling; the autoencoder stays as it is
        "base": {"steps": 7000, "minutes": 4, "batch": 16, "lr": 1e-3, "matrix_lr": 4e-3, "warmup": 40,
                 "betas": (0.9, 0.98), "seed": 11},
        "gpd": {"steps": 16, "minutes": 1.5, "lr": 3e-4, "matrix_lr": 1e-3} | _STUDENT,
        "meanflow": {"steps": 200, "minutes": 1, "lr": 3e-4, "matrix_lr": 1e-3} | _STUDENT | {"ema": 0.98},
        "predictor": {"steps": 240, "minutes": 0.5, "lr": 1e-3, "matrix_lr": 3e-3} | _STUDENT | {"ema": 0.98},
    },
    "others": {
        "gpd": {"steps": 75, "lr": 5e-5, "matrix_lr": 5e-5} | _STUDENT,
        "meanflow": {"steps": 1000, "lr": 5e-5, "matrix_lr": 5e-5} | _STUDENT | {"ema": 0.98},
        "predictor": {"steps": 1000, "lr": 1e-4, "matrix_lr": 3e-4} | _STUDENT | {"ema": 0.98},
    },
}  # fmt: skip
