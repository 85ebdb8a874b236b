"""Measurements as lines of JSON, written one by one, so that a stopped measurement can be resumed."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from ..files import atomic_write


class ResultLog:
    """The lines of a file that have `key`. Lines with another key stay in the file and are ignored."""

    def __init__(self, file: Path, key: str):
        self.file, self.key = file, key
        text = file.read_text() if file.is_file() else ""
        lines = text[: text.rfind("\n") + 1]
        if lines != text:  # the last line is incomplete: the process was killed while writing it
            with atomic_write(file) as part:
                part.write_text(lines)
        self.lines = [line for line in map(json.loads, lines.splitlines()) if line["key"] == key]

    def add(self, **line) -> None:
        """Append a line to the file."""
        self.lines.append({"key": self.key, **line})
        with open(self.file, "a") as log:
            log.write(json.dumps(self.lines[-1]) + "\n")


def config_hash(*config) -> str:
    """16 hex digits that are equal only for equal JSON-ready values."""
    return hashlib.sha256(json.dumps(config).encode()).hexdigest()[:16]
