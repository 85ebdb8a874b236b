"""Caches of others on a model: refused beside our methods, or put on by the host for a peer method."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from diffusers.hooks.hooks import CacheContext, HookFunctionReference, ModelHook, StateManager, _set_cache_context
from torch import Tensor, nn

from ..errors import AccelError
from .hooks import patched_method
from .trace import DENOISER

if TYPE_CHECKING:
    from ..families import Family

CACHES = {  # by the beginning of the names of their hooks
    "fbc": "FirstBlockCache",
    "faster_cache": "FasterCache",
    "mag_cache": "MagCache",
    "pyramid_attention_broadcast": "PyramidAttentionBroadcast",
    "sea_cache": "SeaCache",
    "taylorseer_cache": "TaylorSeerCache",
    "text_kv_cache": "TextKVCache",
}
CACHE_DIT = "cache-dit's cache"


def check_foreign(models: Iterable[nn.Module]) -> None:
    """Raise AccelError if a cache of others is on a model: neither side would see what the other one skips."""
    if cache := foreign_cache(models):
        off = "cache_dit.disable_cache(pipe)" if cache == CACHE_DIT else "disable_cache() of the transformer"
        raise AccelError(
            f"{cache} and accel.apply do not go together, as each skips what the other one counts "
            f"on: take the cache off by {off}, or leave accel.apply"
        )


def foreign_cache(models: Iterable[nn.Module]) -> str | None:
    """The name of a cache of diffusers or cache-dit that is on one of the models."""
    models = list(models)
    if any("_is_cached" in vars(model) for model in models):  # the mark that cache-dit leaves
        return CACHE_DIT
    names = (name for model in models for name in _hook_names(model))
    found = (title for name in names for prefix, title in CACHES.items() if name.startswith(prefix))
    return next((f"diffusers' {title}" for title in found), None)


def _hook_names(model: nn.Module) -> Iterator[str]:
    """The names of diffusers' hooks on a model and its modules."""
    for module in model.modules():
        yield from getattr(getattr(module, "_diffusers_hook", None), "hooks", ())


class ForeignCache:
    """A place of the host: a cache of others on a model, which tells what it let compute.

    A cache calls what it watches over or does not: a call that did not come is work that was skipped. `modules` are
    those modules by name, the model itself being "denoiser"; `computed` has the batch size of each that was called
    since it was cleared.
    """

    left_behind: ClassVar[frozenset[str]] = frozenset({"forward"})  # attributes that a disabled cache leaves on modules

    def __init__(self, model: nn.Module):
        self.model, self.computed = model, {}
        self.modules: list[str] = []

    def enable(self) -> None:
        """Put the cache on, and count the calls below it."""
        raise NotImplementedError

    def disable(self) -> None:
        """Take the cache off."""
        raise NotImplementedError

    def reset(self, context: CacheContext | None) -> None:
        """Forget earlier runs; `context`, where the loop stands, stays."""
        raise NotImplementedError

    @property
    def is_held(self) -> bool:
        """Whether nobody has disabled it."""
        raise NotImplementedError

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors that the cache holds."""
        raise NotImplementedError

    def take(self) -> None:
        """Enable the cache."""
        modules = list(self.model.modules())
        self._before = {module: (set(vars(module)), module.forward) for module in modules}
        self.enable()
        self._forwards = {module: vars(module).get("forward") for module in modules}

    def leave(self) -> None:
        """Disable the cache; the model has exactly the attributes that it had before."""
        tops = {module: vars(module).get("forward") for module in self._before}
        self.disable()
        for module, (names, original) in self._before.items():
            for name in self.left_behind & vars(module).keys() - names:
                if name != "_diffusers_hook" or not module._diffusers_hook.hooks:
                    delattr(module, name)
            if tops[module] is not self._forwards[module]:  # another hook, of accelerate, was put on after the cache's
                module.forward = tops[module]
                if vars(module).get("_old_forward") is self._forwards[module]:
                    module._old_forward = original
            elif "forward" in names:
                module.forward = original


class DiffusersCache(ForeignCache):
    """One of diffusers' caches, whose hooks call what they hooked or do not."""

    left_behind = frozenset({"forward", "_diffusers_hook", "_cache_config"})

    def __init__(self, model: nn.Module, config: Any):
        super().__init__(model)
        self.config = config
        self.hooks: list[ModelHook] = []
        self._hooked: list[tuple[HookFunctionReference, Callable]] = []

    def enable(self) -> None:
        """Enable the cache, and count the calls below its hooks."""
        self.model.enable_cache(self.config)
        for name, module in self.model.named_modules():
            registry = getattr(module, "_diffusers_hook", None)
            for hook in (hook for key, hook in registry.hooks.items() if _is_cache(key)) if registry else ():
                self.hooks.append(hook)
                if original := hook.fn_ref.original_forward:
                    self.modules.append(name or DENOISER)
                    self._hooked.append((hook.fn_ref, original))
                    hook.fn_ref.original_forward = partial(self._compute, name or DENOISER, original)

    def disable(self) -> None:
        """Disable the cache, if nobody has."""
        for reference, original in self._hooked:
            reference.original_forward = original
        if self.model.is_cache_enabled:
            self.model.disable_cache()

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
                 for tensor in tensors_of(value))  # fmt: skip
        return sum({tensor.data_ptr(): tensor.nbytes for tensor in found}.values())

    def _compute(self, name: str, original: Callable, *inputs, **named) -> Any:
        hidden = inputs[0] if inputs else next(value for value in named.values() if isinstance(value, Tensor))
        self.computed[name] = len(hidden)
        return original(*inputs, **named)


class CacheDit(ForeignCache):
    """cache-dit's cache on a model, which calls a block or does not."""

    def __init__(self, model: nn.Module, family: Family, config: Callable[[], dict[str, Any]]):
        super().__init__(model)
        self.family, self.config = family, config
        self.modules = family.block_names(model)

    def enable(self) -> None:
        """Enable the cache, and count the calls of the blocks."""
        import cache_dit

        self.lists, self.order = self.family.block_lists(self.model), list(self.model._modules)
        with quiet(), self._alone():
            self.adapter = cache_dit.get_adapter(self.model)
            cache_dit.enable_cache(self.adapter, **self.config())
        self.manager = self.model._context_manager
        blocks = [(name, self.model.get_submodule(name)) for name in self.modules]
        self.counters = [block.register_forward_pre_hook(self._counter(name)) for name, block in blocks]

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Blocks that cache-dit makes inside decide for this process alone, unless the model is shared by several.

        In any group of processes cache-dit averages what it measures, also over videos of their own: wrong decisions,
        and processes that wait for each other for ever.
        """
        from cache_dit.caching.cache_blocks.pattern_base import CachedBlocks_Pattern_Base

        make = CachedBlocks_Pattern_Base.__init__

        def make_alone(blocks: nn.Module, *args, **named) -> None:
            make(blocks, *args, **named)
            if getattr(self.model, "_parallel_config", None) is None:
                blocks._is_parallelized = lambda: False

        with patched_method(CachedBlocks_Pattern_Base, "__init__", make_alone):
            yield

    def disable(self) -> None:
        """Disable the cache, if nobody has."""
        import cache_dit

        for counter in self.counters:
            counter.remove()
        with quiet():
            cache_dit.disable_cache(self.adapter)
        parts = self.model._modules
        for name in self.order:  # in each call cache-dit exchanges the lists of blocks, and they come back as the last
            parts[name] = parts.pop(name)

    @property
    def is_held(self) -> bool:
        """Whether nobody has disabled it or exchanged a list of blocks."""
        manager = vars(self.model).get("_context_manager")
        return manager is self.manager and self.family.block_lists(self.model) == self.lists

    def reset(self, context: CacheContext | None) -> None:
        """Forget earlier runs, and learn whether a step of this one has two calls."""
        import cache_dit

        cache_dit.refresh_context(self.model, **self.config())

    @property
    def is_second_call(self) -> bool:
        """Whether cache-dit has taken the last call for the second one of its step."""
        return self.manager.is_separate_cfg_step()

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors that the cache holds."""
        found = []
        for name in self.model._context_names:
            context = self.manager.get_context(name)
            calibrators = (*context.get_calibrators(), *context.get_cfg_calibrators())
            found += tensors_of([context.buffers, *(calibrator.states for calibrator in calibrators if calibrator)])
        return sum({tensor.data_ptr(): tensor.nbytes for tensor in found}.values())

    def _counter(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def count(block: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            self.computed[name] = len(inputs[0])

        return count


@contextmanager
def quiet() -> Iterator[None]:
    """Inside the context cache-dit logs errors alone; each of its modules has a logger with a level of its own."""
    levels = {name: logging.getLogger(name).level for name in logging.root.manager.loggerDict if "cache_dit" in name}
    try:
        for name in levels:
            logging.getLogger(name).setLevel(logging.ERROR)
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


def _is_cache(hook: str) -> bool:
    return hook.startswith(tuple(CACHES))


def tensors_of(value: Any) -> Iterator[Tensor]:
    """The tensors in the state of a cache, without single numbers."""
    if isinstance(value, Tensor):
        yield from [value] if value.ndim else []
    elif isinstance(value, StateManager):
        yield from tensors_of(value._state_cache)
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from tensors_of(item)
    elif type(value).__name__.endswith("State"):
        yield from tensors_of(vars(value))
