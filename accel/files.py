"""Writing a file whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_write(file: Path) -> Iterator[Path]:
    """A path beside a file to write to; once that is done without an error, it takes the file's place."""
    part = file.with_name(file.name + ".part")
    yield part
    os.replace(part, file)
