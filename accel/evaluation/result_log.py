"""Measurements as they come: a line of JSON each, so that a second start goes on where the first one stopped."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from ..files import atomic_write


class ResultLog:
    """The lines of a file that belong to `key`; those of another key stay in the file and are not counted in."""

    def __init__(self, file: Path, key: str):
        self.file, self.key = file, key
        text = file.read_text() if file.is_file() else ""
        lines = text[: text.rfind("\n") + 1]
        if lines != text:  # a kill cut the last one short
            with atomic_write(file) as part:
                part.write_text(lines)
        self.lines = [line for line in map(json.loads, lines.splitlines()) if line["key"] == key]

    def add(self, **line) -> None:
        """Put a line into the file at once."""
        self.lines.append({"key": self.key, **line})
        with open(self.file, "a") as log:
            log.write(json.dumps(self.lines[-1]) + "\n")


def config_hash(*what) -> str:
    """A short name of anything JSON can hold: equal for equal settings only."""
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]
