"""What is known of a student or predictor beside its weights, and whether it belongs to the pipeline's model."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from .scheduler import is_student_run
from .weights import matches_fingerprint

S = TypeVar("S", bound=BaseModel)


def load_manifest(folder: Path, name: str, kind: type[S], knob: str, command: str) -> S:
    """What the file `name` says of what was trained in a folder.

    Raises ValueError if there is none: `knob` names another folder, `command` makes one.
    """
    file, what = folder / name, knob.partition(".")[2].removesuffix("_dir")
    if not file.is_file():
        others = sorted(p.parent.name for p in folder.parent.glob(f"*/{name}")) or [f"none: python -m accel {command}"]
        raise ValueError(
            f"there is no {what} {folder.name!r} in that place ({knob} names another); there are {', '.join(others)}"
        )
    try:
        return kind.model_validate_json(file.read_text())
    except ValidationError as error:
        raise ValueError(f"{file} is no {what}: {error.errors()[0]['msg']}") from None


def check_base(folder: Path, base: list[float], pipe) -> None:
    """Raise ValueError if the student in a folder was made from another transformer than the pipeline's."""
    if is_student_run(pipe):
        raise ValueError(f"student {folder.name!r} and another one do not go together: each replaces the whole model")
    if getattr(pipe, "transformer_2", None) is not None:
        raise ValueError(f"student {folder.name!r} replaces one transformer, this pipeline has two")
    if not matches_fingerprint(pipe.transformer, base):
        raise ValueError(f"student {folder.name!r} was made from another base model: train it from this one")
