"""Measurements as lines of JSON, written one by one, so that a stopped measurement can be resumed."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

from accelerate import PartialState

from ..errors import AccelError
from ..files import atomic_write


class ResultLog:
    """The lines of a file that belong to `keys`, {setting: key}. Other lines stay in the file and are ignored.

    So a setting that is new or was changed is measured, and all others keep their lines. Of several processes, each but
    the first writes to a file of its own beside it, until `join` puts all into one.
    """

    def __init__(self, file: Path, keys: dict[str, str], state: PartialState | None = None):
        self.file, self.keys, self.state = file, keys, state or PartialState()
        self.join()

    def join(self) -> None:
        """Collect the lines of all processes, also of killed ones, and read them. Every process calls this."""
        self.state.wait_for_everyone()
        if self.state.is_main_process:
            of_process = re.compile(rf"{re.escape(self.file.stem)}-\d+{re.escape(self.file.suffix)}")
            parts = sorted(file for file in self.file.parent.iterdir() if of_process.fullmatch(file.name))
            with atomic_write(self.file) as joined:
                joined.write_text("".join(map(_complete_lines, (self.file, *parts))))
            for part in parts:
                part.unlink()
        self.state.wait_for_everyone()
        lines = [self._parsed(number, text) for number, text in enumerate(self.file.read_text().splitlines(), 1)]
        self.lines = [line for line in lines if line["key"] == self.keys.get(line["setting"])]
        self.state.wait_for_everyone()  # the first process adds no line before all have read the same ones

    def _parsed(self, number: int, text: str) -> dict:
        try:
            return json.loads(text)
        except ValueError:
            raise AccelError(f"line {number} of {self.file} is damaged: delete that line") from None

    def add(self, setting: str, **line) -> None:
        """Append a line of a setting to this process's file."""
        self.lines.append({"key": self.keys[setting], "setting": setting, **line})
        process = self.state.process_index
        file = self.file.with_stem(f"{self.file.stem}-{process}") if process else self.file
        with open(file, "a") as log:
            log.write(json.dumps(self.lines[-1]) + "\n")


def _complete_lines(file: Path) -> str:
    """The text of a file, without a last line that was cut short because its process was killed."""
    text = file.read_text() if file.is_file() else ""
    return text[: text.rfind("\n") + 1]


def read_results(file: Path, command: str) -> dict:
    """The content of a results.json. Raises AccelError if it is not one that the command writes."""
    try:
        found = json.loads(file.read_bytes())
    except ValueError:  # not JSON, or not UTF-8
        found = None
    if not isinstance(found, dict):
        raise AccelError(f"{file} was not written by `accel {command}`: give another --out")
    return found


def config_hash(*config) -> str:
    """16 hex digits that are equal only for equal JSON-ready values."""
    return hashlib.sha256(json.dumps(config).encode()).hexdigest()[:16]
