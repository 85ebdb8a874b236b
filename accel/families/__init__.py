"""What the host must know of a model family: where its denoisers, attentions and grid are. The only list of them."""

from __future__ import annotations

from types import ModuleType

from . import wan

FAMILIES: dict[str, ModuleType] = {"Wan": wan}


def family_of(pipe) -> ModuleType:
    """The family of a diffusers pipeline, by its class name. Raises ValueError for one that is not known."""
    name = type(pipe).__name__
    for prefix, family in FAMILIES.items():
        if name.startswith(prefix):
            return family
    raise ValueError(f"{name} is not supported yet; pipelines whose names start with {', '.join(FAMILIES)} are")
