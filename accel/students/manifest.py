"""Reads the JSON manifest that lies with a student's or predictor's weights. Imports no torch."""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import AccelError, quote
from ..files import M, read_model


def load_manifest(folder: Path, file: str, kind: type[M], parameter: str, command: str) -> M:
    """The manifest `file` of the weights in a folder, validated as `kind`.

    Raises AccelError if it is missing or not valid. The message names the `parameter` that selects another folder, such
    as "gpd.student", and the `command` that trains one.
    """
    path, what = folder / file, parameter.partition(".")[2].removesuffix("_dir")
    if not os.path.isfile(path):  # false for what cannot be a path, too
        others = sorted(p.parent.name for p in folder.parent.glob(f"*/{file}"))
        found = "there are " + ", ".join(others) if others else f"`python -m accel {command}` makes one"
        raise AccelError(f"there is no {what} {quote(folder.name)} ({parameter} names another folder); {found}")
    return read_model(kind, path, what)
