"""Example prompts: sentences of its world for a model of the toy world, everyday scenes for every other one."""

from __future__ import annotations

from .models import ModelDefaults
from .paths import ROOT

FOLDER = ROOT / "examples" / "prompts"


def example_prompts(defaults: ModelDefaults | None) -> list[str]:
    """The prompts to try first on a model with these defaults; None for a model that has no `accel.json`."""
    world = "toy" if defaults is not None and defaults.toy_world else "real"
    return (FOLDER / f"{world}.txt").read_text().splitlines()


def is_example(prompt: str) -> bool:
    """Whether a prompt is an example of any model."""
    return any(prompt in file.read_text().splitlines() for file in FOLDER.glob("*.txt"))
