"""Finds what diffusers has put on a model that cannot go together with accel: its own caches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import nn

from ..errors import AccelError

CACHES = {  # by the beginning of the names of their hooks
    "fbc": "FirstBlockCache",
    "faster_cache": "FasterCache",
    "mag_cache": "MagCache",
    "pyramid_attention_broadcast": "PyramidAttentionBroadcast",
    "sea_cache": "SeaCache",
    "taylorseer_cache": "TaylorSeerCache",
    "text_kv_cache": "TextKVCache",
}


def check_foreign(models: Iterable[nn.Module]) -> None:
    """Raise AccelError if one of diffusers' caches is on a model: neither side would see what the other one skips."""
    if cache := foreign_cache(models):
        raise AccelError(
            f"diffusers' {cache} and accel.apply do not go together, as each skips what the other one counts "
            "on: take the cache off by disable_cache() of the transformer, or leave accel.apply"
        )


def foreign_cache(models: Iterable[nn.Module]) -> str | None:
    """The name of a cache of diffusers that is on one of the models."""
    names = (name for model in models for name in _hook_names(model))
    return next((title for name in names for prefix, title in CACHES.items() if name.startswith(prefix)), None)


def _hook_names(model: nn.Module) -> Iterator[str]:
    """The names of diffusers' hooks on a model and its modules."""
    for module in model.modules():
        yield from getattr(getattr(module, "_diffusers_hook", None), "hooks", ())
