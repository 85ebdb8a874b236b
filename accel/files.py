"""Writes a file completely or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_write(file: Path) -> Iterator[Path]:
    """A temporary path to write to; without an error it replaces `file` at the end."""
    part = file.with_name(file.name + ".part")
    yield part
    os.replace(part, file)
