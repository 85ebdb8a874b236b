"""The folder that holds the shipped files: `presets/`, `models/tiny-wan`, `examples/`."""

from __future__ import annotations

from pathlib import Path


def data_root() -> Path:
    """The checkout's root, or `accel/_data` in an installed wheel, which packs the same folders there."""
    package = Path(__file__).resolve().parents[1]
    packed = package / "_data"
    return packed if packed.is_dir() else package.parent


ROOT = data_root()
