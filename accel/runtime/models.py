"""Loads pipelines by path or hub id, checks their files, and reads what each model generates by default."""

from __future__ import annotations

import hashlib
import inspect
import os
import re
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, ValidationError

from ..errors import AccelError, explain_os_error, quote
from ..files import atomic_write, read_json
from .paths import ROOT

if TYPE_CHECKING:
    import torch

    from ..methods import Method

TINY = "models/tiny-wan"
HASH = ".sha256"  # ending of a file with the hash of the one beside it
STUDENTS = re.compile("gpd-|meanflow$|predictor$|fittedsolver$")  # folders of methods in a model's folder


class ModelDefaults(BaseModel, frozen=True):
    """What a model generates by default; a local model says so in its `accel.json`."""

    height: int = 480
    width: int = 832
    frames: int = 81
    steps: int = 50
    guidance: float = 5.0
    fps: int = 16
    text_length: int = 512
    toy_world: bool = False  # trained on the captioned toy world
    metrics: tuple[str, ...] = ()  # quality metrics of this model, beside those of every model


def resolve(model: str) -> str:
    """The path of a model's folder, absolute or relative to the project; a hub id is returned unchanged."""
    for path in (Path(model), ROOT / model):
        if os.path.isdir(path):  # false for what cannot be a path, too
            return str(path)
    return model


def check_model(model: str) -> None:
    """Raise AccelError if a local model's folder, or one of its files, is missing or damaged; says how to get it."""
    path = Path(resolve(model))
    if os.path.isdir(path):
        check_files(path)
    elif model.startswith((".", "/", "models/")) or model.count("/") != 1:
        raise AccelError(f"no model folder {quote(model)}; the shipped model is {TINY!r}, or give a Hugging Face id")


def load_pipeline(model: str = TINY, device: str | None = None, dtype: torch.dtype | None = None):
    """The diffusers pipeline of a folder or hub id, on the GPU if there is one.

    By default in float32, but a large model on a GPU in bfloat16. Raises AccelError for missing or damaged weights.
    """
    import torch
    from diffusers import DiffusionPipeline

    check_model(model)
    device, defaults = device or ("cuda" if torch.cuda.is_available() else "cpu"), read_defaults(model)
    large = torch.device(device).type == "cuda" and not (defaults and defaults.toy_world)
    dtype = dtype or (torch.bfloat16 if large else torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            pipe = DiffusionPipeline.from_pretrained(resolve(model), torch_dtype=dtype, use_safetensors=True)
        except Exception as error:  # of any kind: damaged files fail anywhere inside
            damaged = ", its files are damaged or incomplete" if os.path.isdir(resolve(model)) else ""
            raise AccelError(f"{model!r} could not be loaded{damaged} ({_first_line(error)})") from error
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def _first_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.errno is not None:
        return explain_os_error(error)
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def check_files(folder: Path) -> None:
    """Raise AccelError naming the first missing or damaged file of a pipeline folder, and how to get it."""
    index = folder / "model_index.json"
    if not index.is_file():
        raise AccelError(f"{index} is missing: {folder} is not a diffusers pipeline; {_remedy(folder)}")
    for part in [name for name, kind in read_config(index).items() if isinstance(kind, list) and kind[0]]:
        if not (folder / part).is_dir():
            raise AccelError(f"{folder / part} is missing; {_remedy(folder)}")
        if (folder / part / "config.json").is_file():  # a model; schedulers and tokenizers have no weights
            _check_part(folder, folder / part)


def _check_part(folder: Path, part: Path) -> None:
    from safetensors import SafetensorError, safe_open

    listed = [read_config(index)["weight_map"].values() for index in part.glob("*.safetensors.index.json")]
    weights = {part / name for names in listed for name in names} or set(part.glob("*.safetensors"))
    if not weights:
        raise AccelError(f"{part} holds no .safetensors file; {_remedy(folder)}")
    for file in sorted(weights):
        if not file.is_file():
            raise AccelError(f"{file} is missing; {_remedy(folder)}")
        try:
            with safe_open(file, "np") as weights:
                weights.keys()
        except SafetensorError as error:
            raise AccelError(f"{file} is damaged ({error}); {_remedy(folder)}") from None
        _check_hash(file, folder)


def _check_hash(file: Path, folder: Path) -> None:
    """Raise AccelError if the SHA-256 of weights is not the one recorded beside them; a user's model may have none."""
    recorded = file.with_name(file.name + HASH)
    if recorded.is_file() and recorded.read_text().split()[:1] != [hash_of(file)]:
        raise AccelError(f"{file} is damaged (its SHA-256 is not that in {recorded.name}); {_remedy(folder)}")


def record_hashes(folder: Path) -> None:
    """Write the SHA-256 of each .safetensors file below a folder beside it, as `sha256sum -c` reads it."""
    for file in sorted(folder.rglob("*.safetensors")):
        with atomic_write(file.with_name(file.name + HASH)) as part:
            part.write_text(f"{hash_of(file)}  {file.name}\n")


def read_config(file: Path) -> dict:
    """The content of a JSON file of a model. Raises AccelError if it is damaged."""
    return read_json(file, _remedy(file.parent))


def folders_of_results(model: str, out: Path, name: str = "") -> list[Path]:
    """Where a command writes what it found out about a model: `out` and, for a local model, `name` in its folder.

    Not into a folder that may only be read, such as that of an installed package.
    """
    folder = Path(resolve(model))
    return [out, folder / name] if folder.is_dir() and os.access(folder, os.W_OK) else [out]


def write_results(model: str, out: Path, file: str, text: str, name: str = "") -> list[Path]:
    """The paths of a file with a text, after writing it to each of the `folders_of_results`."""
    files = [folder / file for folder in folders_of_results(model, out, name)]
    for path in files:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as part:
            part.write_text(text)
    return files


def weights(model: str) -> list[tuple[str, str]]:
    """Name and SHA-256 of each file of a local model that affects what it generates; an empty list for a hub id.

    Excludes training records, and the folders of students, predictors and fitted solvers.
    """
    folder = Path(resolve(model))
    files = sorted([*folder.rglob("*.safetensors"), *folder.rglob("*.json")])
    files = [f for f in files if f.name != "training.json" and not STUDENTS.match(f.relative_to(folder).parts[0])]
    return [(str(f.relative_to(folder)), hash_of(f)) for f in files]


def method_weights(methods: Iterable[Method], model: str) -> list[str]:
    """SHA-256 of each file that methods read besides the model's own: a student may have been replaced."""
    return [hash_of(file) for method in methods for file in method.files(resolve(model))]


def hash_of(file: Path) -> str:
    """SHA-256 of a file."""
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _remedy(folder: Path) -> str:
    return f"restore it with `git checkout -- {folder.name}` there, or train it with `python -m accel train all`"


def read_defaults(model: str) -> ModelDefaults | None:
    """The content of a local model's `accel.json`, if it has one. Raises AccelError if it is not valid."""
    file = Path(resolve(model)) / "accel.json"
    try:
        return ModelDefaults.model_validate_json(file.read_bytes()) if os.path.isfile(file) else None
    except ValidationError as error:
        first = error.errors()[0]
        where = "".join(f"{name}: " for name in first["loc"])
        raise AccelError(f"{file} is damaged ({where}{first['msg']}); {_remedy(file.parent)}") from None
    except OSError as error:
        raise AccelError(explain_os_error(error)) from error


def model_defaults(pipe, model: str) -> ModelDefaults:
    """A model's `accel.json`, or else the default arguments of its pipeline's call."""
    from ..families import family_of

    if defaults := read_defaults(model):
        return defaults
    names = {"height": "height", "width": "width", "num_frames": "frames"}
    names |= {"num_inference_steps": "steps", "guidance_scale": "guidance", "max_sequence_length": "text_length"}
    parameters = inspect.signature(pipe.__call__).parameters
    if missing := {*names, "callback_on_step_end"} - parameters.keys():
        raise AccelError(f"{type(pipe).__name__} takes no {min(missing)}: use accel.apply in code of your own for it")
    values = {ours: parameters[theirs].default for theirs, ours in names.items()}
    values |= {
        name: getattr(pipe, f"default_{name}") for name in ("height", "width") if hasattr(pipe, f"default_{name}")
    }
    family = family_of(pipe)
    config, (space, _) = family.denoiser(pipe).config, family.compression(pipe)
    if values["height"] is None and "sample_height" in config:  # CogVideoX: its size is the model's
        sample = {"height": space * config.sample_height, "width": space * config.sample_width}
        values |= {**sample, "frames": config.sample_frames}
    return ModelDefaults(**{name: value for name, value in values.items() if value is not None}, fps=family.fps)
