"""Diffusers' own caches on a model: refused beside our methods, or put on by the host for a peer method."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

from diffusers.hooks.hooks import CacheContext, HookFunctionReference, ModelHook, StateManager, _set_cache_context
from torch import Tensor, nn

from ..errors import AccelError
from .trace import DENOISER

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


class DiffusersCache:
    """A place of the host: one of diffusers' caches on a model, which tells what it let compute.

    A cache hooks modules, and calls what it hooked or does not: a call that did not come is work that was skipped.
    `modules` are the hooked ones by name, the model itself being "denoiser"; `computed` has the batch size of each
    that was called since it was cleared.
    """

    def __init__(self, model: nn.Module, config: Any):
        self.model, self.config, self.computed = model, config, {}
        self.modules: list[str] = []
        self.hooks: list[ModelHook] = []
        self._hooked: list[tuple[HookFunctionReference, Callable]] = []

    def take(self) -> None:
        """Enable the cache, and count the calls below its hooks."""
        modules = list(self.model.modules())
        self._before = {module: (LEFT_BEHIND & vars(module).keys(), module.forward) for module in modules}
        self.model.enable_cache(self.config)
        self._forwards = {module: vars(module).get("forward") for module in modules}
        for name, module in self.model.named_modules():
            registry = getattr(module, "_diffusers_hook", None)
            for hook in (hook for key, hook in registry.hooks.items() if _is_cache(key)) if registry else ():
                self.hooks.append(hook)
                if original := hook.fn_ref.original_forward:
                    self.modules.append(name or DENOISER)
                    self._hooked.append((hook.fn_ref, original))
                    hook.fn_ref.original_forward = partial(self._compute, name or DENOISER, original)

    def leave(self) -> None:
        """Disable the cache; the model has exactly the attributes that it had before."""
        for reference, original in self._hooked:
            reference.original_forward = original
        tops = {module: vars(module).get("forward") for module in self._before}
        if self.model.is_cache_enabled:
            self.model.disable_cache()
        for module, (names, original) in self._before.items():
            for name in LEFT_BEHIND & vars(module).keys() - names:
                if name != "_diffusers_hook" or not module._diffusers_hook.hooks:
                    delattr(module, name)
            if tops[module] is not self._forwards[module]:  # another hook, of accelerate, was put on after the cache's
                module.forward = tops[module]
                if vars(module).get("_old_forward") is self._forwards[module]:
                    module._old_forward = original

    @property
    def is_held(self) -> bool:
        """Whether nobody has disabled it."""
        return self.model._cache_config is self.config

    def reset(self, context: CacheContext | None) -> None:
        """Forget earlier runs; `context`, where the loop stands, stays."""
        self.model._reset_stateful_cache()
        _set_cache_context(self.model, context)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors that the cache holds."""
        found = (tensor for hook in self.hooks for name, value in vars(hook).items() if name != "config"
                 for tensor in _tensors(value))  # fmt: skip
        return sum({tensor.data_ptr(): tensor.nbytes for tensor in found}.values())

    def _compute(self, name: str, original: Callable, *inputs, **named) -> Any:
        hidden = inputs[0] if inputs else next(value for value in named.values() if isinstance(value, Tensor))
        self.computed[name] = len(hidden)
        return original(*inputs, **named)


LEFT_BEHIND = {"forward", "_diffusers_hook", "_cache_config"}  # attributes that a disabled cache leaves on modules


def _is_cache(hook: str) -> bool:
    return hook.startswith(tuple(CACHES))


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in the state of a cache's hook, without single numbers."""
    if isinstance(value, Tensor):
        yield from [value] if value.ndim else []
    elif isinstance(value, StateManager):
        yield from _tensors(value._state_cache)
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item)
    elif type(value).__name__.endswith("State"):
        yield from _tensors(vars(value))
