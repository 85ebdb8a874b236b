"""The models that visitors may choose: the shipped one, folders of the owner, and known hub ids where a GPU is."""

from __future__ import annotations

import os
import socket
import subprocess
from dataclasses import dataclass
from pathlib import Path

from accel.errors import AccelError
from accel.runtime.models import TINY, check_model, resolve
from ui import zero_gpu


@dataclass(frozen=True)
class ModelChoice:
    """A model of the selector; `reason` says in a sentence why it cannot be used, or is empty."""

    id: str
    title: str
    reason: str = ""

    @property
    def usable(self) -> bool:
        """Whether a job may name this model."""
        return not self.reason

    @property
    def label(self) -> str:
        """The title, and whether it cannot be used."""
        return self.title if self.usable else f"{self.title} (not here)"


@dataclass(frozen=True)
class HubModel:
    """A model of the Hugging Face hub that the page offers; `gigabytes` are those of all its weights in bfloat16."""

    id: str
    name: str
    gigabytes: int
    licence: str

    @property
    def title(self) -> str:
        """Name, size and licence, as the selector shows them."""
        return f"{self.name} · {self.gigabytes} GB of weights · {self.licence}"


HUB = (
    HubModel("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "Wan 2.1 1.3B", 15, "Apache 2.0"),
    HubModel("Wan-AI/Wan2.2-TI2V-5B-Diffusers", "Wan 2.2 5B", 23, "Apache 2.0"),
    HubModel("Wan-AI/Wan2.1-T2V-14B-Diffusers", "Wan 2.1 14B", 40, "Apache 2.0"),
)
HUB_HOST, HUB_SECONDS = "huggingface.co", 2
SHIPPED = "tiny-wan · shipped toy model"  # title of `TINY`
MEMORY_FACTOR = 1.25  # what a run needs beside the weights, without methods that hold more


def model_choices(first: str = TINY, root: Path | None = None) -> list[ModelChoice]:
    """All models to choose from, `first` first: the shipped one, the pipeline folders in `root`, and those of `HUB`.

    Raises AccelError if `root` is not a folder.
    """
    if root is not None and not root.is_dir():
        raise AccelError(f"--models {root} is not a folder; it is the folder that holds the folders of the pipelines")
    folders = sorted(str(file.parent) for file in root.glob("*/model_index.json")) if root else []
    hub = {model.id: model for model in HUB}
    local = [_local(model) for model in dict.fromkeys([first, TINY, *folders]) if model not in hub]
    memory = gpu_gigabytes()
    online = memory > 0 and hub_answers()
    known = [  # one that the owner has named is tried as it is
        ModelChoice(model.id, model.title, "" if model.id == first else _missing(model, memory, online))
        for model in HUB
    ]
    return sorted(local + known, key=lambda choice: choice.id != first)


def gpu_gigabytes() -> float:
    """Memory of the largest NVIDIA GPU; 0 if there is none. Does not import torch, which takes seconds."""
    if zero_gpu.ACTIVE:
        return zero_gpu.GIGABYTES
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return 0
    try:
        told = subprocess.run(
            ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"],
            capture_output=True, text=True, timeout=10, check=True,
        )  # fmt: skip
        return max((int(line) / 1000 for line in told.stdout.split()), default=0)
    except (OSError, subprocess.SubprocessError, ValueError):
        return 0


def hub_answers() -> bool:
    """Whether the Hugging Face hub can be reached; its client is not asked if it is told to stay offline."""
    if os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes", "on"):
        return False
    try:
        socket.create_connection((HUB_HOST, 443), timeout=HUB_SECONDS).close()
    except OSError:
        return False
    return True


def _local(model: str) -> ModelChoice:
    """The choice of a folder, or of the hub id that the owner has named, which is not checked before it is loaded."""
    title = SHIPPED if resolve(model) == resolve(TINY) else Path(model).name
    try:
        check_model(model)
    except AccelError as error:
        return ModelChoice(model, title, str(error))
    return ModelChoice(model, title)


def _missing(model: HubModel, memory: float, online: bool) -> str:
    """What a hub model needs that this server lacks; an empty text if it lacks nothing."""
    needed = round(MEMORY_FACTOR * model.gigabytes)
    if memory < needed:
        found = f"that of this server has {memory:.0f} GB" if memory else "this server has none"
        return f"{model.name} needs a GPU with {needed} GB of memory, but {found}"
    return "" if online else f"{model.name} is downloaded from {HUB_HOST}, which this server cannot reach"
