"""A hook around a module's forward, on diffusers' own registry, that can be checked, taken off and put on again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

from diffusers.hooks.group_offloading import _LAZY_PREFETCH_GROUP_OFFLOADING
from diffusers.hooks.hooks import BaseState, CacheContext, HookRegistry, ModelHook, StateManager
from torch import nn

from ..errors import AccelError

NAME = "accel"  # in the registry


class ForwardHook(ModelHook):
    """Calls `wrapper(hook, *args, **kwargs)` in place of a module's forward; sees the pipeline's cache context."""

    _is_stateful = True

    def __init__(self, wrapper: Callable):
        super().__init__()
        self.wrapper, self.states = wrapper, StateManager(BaseState)

    def new_forward(self, module: nn.Module, *args, **kwargs):
        return self.wrapper(self, *args, **kwargs)

    @property
    def context(self) -> CacheContext | None:
        """The pipeline's cache context, where it has one."""
        return self.states._context

    @property
    def original(self) -> Callable:
        """The forward that the hook wraps."""
        return self.fn_ref.original_forward

    def reset_state(self, module: nn.Module) -> nn.Module:
        self.states.reset()
        return module


class HookedForward:
    """A place of the host: the forward of a module, wrapped. Others may put hooks of their own below and above it."""

    def __init__(self, module: nn.Module, wrapper: Callable):
        self.module, self.hook = module, ForwardHook(wrapper)

    def take(self) -> None:
        """Put the hook on. Raises AccelError where it is on, or where group offloading would take it off again."""
        module = self.module
        self._had_registry, self._had_forward = "_diffusers_hook" in vars(module), "forward" in vars(module)
        if self._had_registry and module._diffusers_hook.get_hook(_LAZY_PREFETCH_GROUP_OFFLOADING):
            raise AccelError(
                "group offloading with streams learns its order in a first call: "
                "call the pipeline once before accel.apply"
            )
        registry = HookRegistry.check_if_exists_or_initialize(module)
        registry.register_hook(self.hook, NAME)
        registry.invalidate_child_registries_cache()
        self._forward, self._own = module.forward, self.hook.fn_ref.forward

    @property
    def is_held(self) -> bool:
        """Whether a call of the module still comes to the hook."""
        if self.hook.fn_ref.forward is not self._own:  # a hook below is gone, as group offloading's for a LoRA
            return False
        forward = self.module.forward
        while forward is not None and forward is not self._forward:
            forward = getattr(forward, "__wrapped__", None)
        return forward is not None

    def leave(self) -> None:
        """Take the hook off; without hooks of others, the module has exactly the attributes it had before."""
        module, top = self.module, self.module.forward
        registry = getattr(module, "_diffusers_hook", None)
        if registry is None or registry.get_hook(NAME) is not self.hook:
            return
        if (ref := self.hook.fn_ref).forward is not self._own:
            ref.original_forward = ref.forward  # not that of the hook that is gone
        registry.remove_hook(NAME, recurse=False)  # sets the forward, whatever it is now
        registry._child_registries_cache = None
        if not self._had_registry and not registry.hooks:
            del module._diffusers_hook
        if top is not self._forward:  # another hook was put on after this one
            module.forward = top
            if vars(module).get("_old_forward") is self._forward:
                module._old_forward = self.hook.original
        elif not self._had_forward:
            del module.forward


@contextmanager
def patched_method(owner, name: str, fn: Callable) -> Iterator[None]:
    """Replace a method of an object or class by a function; on exit it has exactly the attributes it had before."""
    before = vars(owner).get(name)
    setattr(owner, name, fn)
    try:
        yield
    finally:
        delattr(owner, name)
        if before is not None:
            setattr(owner, name, before)


def refused_method(owner, name: str, reason: str) -> AbstractContextManager[None]:
    """Inside the context, calling a method of an object raises AccelError with the reason."""

    def refuse(*args, **named):
        raise AccelError(reason)

    return patched_method(owner, name, refuse)
