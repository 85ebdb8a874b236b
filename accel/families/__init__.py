"""Model families: where a pipeline's transformers, attentions and token grid are. The only list of them."""

from __future__ import annotations

from ..errors import AccelError
from .base import Family
from .wan import Wan

FAMILIES: dict[str, Family] = {"Wan": Wan()}  # by the beginning of the pipeline's class name


def family_of(pipe) -> Family:
    """The family of a diffusers pipeline, by its class name. Raises AccelError if it is not supported."""
    name = type(pipe).__name__
    for prefix, family in FAMILIES.items():
        if name.startswith(prefix):
            return family
    raise AccelError(f"{name} is not supported yet; pipelines whose names start with {', '.join(FAMILIES)} are")
