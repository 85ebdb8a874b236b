"""`captions.json`, which maps each video of a folder to its caption."""

from __future__ import annotations

import json
from pathlib import Path

from ..errors import AccelError


def read_captions(folder: Path) -> dict[str, str]:
    """{file name: caption} of a folder of videos, at least one. Raises AccelError if one is missing or damaged."""
    file = folder / "captions.json"
    if not file.is_file():
        raise AccelError(f"{file} is missing: it maps each video of the folder to its caption")
    try:
        captions = json.loads(file.read_bytes())
    except ValueError as error:  # not JSON, or not UTF-8
        raise AccelError(f"{file} is damaged: {error}") from None
    if not isinstance(captions, dict) or not all(isinstance(text, str) for text in captions.values()):
        raise AccelError(f"{file} does not map each video of the folder to a caption: it is not an object of texts")
    if not captions:
        raise AccelError(f"{file} names no videos")
    if missing := [name for name in captions if not (folder / name).is_file()]:
        raise AccelError(f"{folder} has no {missing[0]}, which captions.json names")
    return captions
