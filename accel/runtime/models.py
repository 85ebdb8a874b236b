"""Pipelines by path or hub id, and what each is made for: its size, step count and guidance."""

from __future__ import annotations

import hashlib
import inspect
import json
import re
import warnings
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from pydantic import BaseModel, ValidationError
from safetensors import SafetensorError, safe_open

from .paths import ROOT

TINY = "models/tiny-wan"
STUDENTS = re.compile("gpd-|meanflow$|predictor$")  # folders of other models, that lie beside one


class ModelDefaults(BaseModel, frozen=True):
    """A model's own settings: what it generates when nothing else is asked for."""

    height: int = 480
    width: int = 832
    frames: int = 81
    steps: int = 50
    guidance: float = 5.0
    fps: int = 16
    text_length: int = 512
    toy_world: bool = False  # trained on the toy world, so that prompts can be judged


def resolve(model: str) -> str:
    """A path of an existing folder, also relative to the project, or the name unchanged (a hub id)."""
    for path in (Path(model), ROOT / model):
        if path.is_dir():
            return str(path)
    return model


def load_pipeline(model: str = TINY, device: str | None = None, dtype: torch.dtype | None = None):
    """The diffusers pipeline of a folder or hub id, on the best device. ValueError for missing or damaged weights."""
    path, device = resolve(model), device or ("cuda" if torch.cuda.is_available() else "cpu")
    defaults = read_defaults(model)
    if Path(path).is_dir():
        check_files(Path(path))
    elif model.startswith((".", "/", "models/")) or model.count("/") != 1:
        raise ValueError(f"no model folder {model!r}; the shipped model is {TINY!r}, or give a Hugging Face id")
    large = torch.device(device).type == "cuda" and not (defaults and defaults.toy_world)
    dtype = dtype or (torch.bfloat16 if large else torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            pipe = DiffusionPipeline.from_pretrained(path, torch_dtype=dtype, use_safetensors=True)
        except (OSError, ValueError, RuntimeError) as error:
            raise ValueError(f"{model!r} could not be loaded: {str(error).splitlines()[0]}") from None
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def check_files(folder: Path) -> None:
    """Raise ValueError naming the first missing or damaged weight file of a pipeline folder, and how to get it."""
    index = folder / "model_index.json"
    if not index.is_file():
        raise ValueError(f"{index} is missing: {folder} is no diffusers pipeline; {_remedy(folder)}")
    for part in [name for name, kind in _json(index).items() if isinstance(kind, list) and kind[0]]:
        if not (folder / part).is_dir():
            raise ValueError(f"{folder / part} is missing; {_remedy(folder)}")
        if (folder / part / "config.json").is_file():  # a model; schedulers and tokenizers have no weights
            _check_part(folder, folder / part)


def _check_part(folder: Path, part: Path) -> None:
    listed = [_json(index)["weight_map"].values() for index in part.glob("*.safetensors.index.json")]
    weights = {part / name for names in listed for name in names} or set(part.glob("*.safetensors"))
    if not weights:
        raise ValueError(f"{part} holds no .safetensors file; {_remedy(folder)}")
    for file in sorted(weights):
        if not file.is_file():
            raise ValueError(f"{file} is missing; {_remedy(folder)}")
        try:
            with safe_open(file, "pt") as intercept_attention:
                intercept_attention.keys()
        except SafetensorError as error:
            raise ValueError(f"{file} is damaged ({error}); {_remedy(folder)}") from None


def _json(file: Path) -> dict:
    try:
        return json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is damaged ({error}); {_remedy(file.parent)}") from None


def weights(model: str) -> list[tuple[str, str]]:
    """Name and SHA-256 of each file of a local model that decides what it generates; nothing for a hub id.

    Not its record of training, which is about the past, nor its students, which are other models.
    """
    folder = Path(resolve(model))
    files = sorted([*folder.rglob("*.safetensors"), *folder.rglob("*.json")])
    own = [f for f in files if f.name != "training.json" and not STUDENTS.match(f.relative_to(folder).parts[0])]
    return [(str(f.relative_to(folder)), hash_of(f)) for f in own]


def hash_of(file: Path) -> str:
    """SHA-256 of a file."""
    with open(file, "rb") as intercept_attention:
        return hashlib.file_digest(intercept_attention, "sha256").hexdigest()


def _remedy(folder: Path) -> str:
    return f"restore it with `git checkout -- {folder.name}` there, or train it with `python -m accel train all`"


def read_defaults(model: str) -> ModelDefaults | None:
    """The settings in a local model's `accel.json`, if it has one."""
    file = Path(resolve(model)) / "accel.json"
    try:
        return ModelDefaults.model_validate_json(file.read_text()) if file.is_file() else None
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{file}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def model_defaults(pipe, model: str) -> ModelDefaults:
    """The settings a model is made for: its own, else the defaults of its pipeline's call."""
    if own := read_defaults(model):
        return own
    names = {"height": "height", "width": "width", "num_frames": "frames"}
    names |= {"num_inference_steps": "steps", "guidance_scale": "guidance"}
    defaults = {ours: inspect.signature(pipe.__call__).parameters[name].default for name, ours in names.items()}
    return ModelDefaults(**{k: v for k, v in defaults.items() if v is not None})
