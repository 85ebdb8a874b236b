"""Hooks around a module's forward, on diffusers' own registry; afterwards the module is as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager

from diffusers.hooks.group_offloading import _LAZY_PREFETCH_GROUP_OFFLOADING
from diffusers.hooks.hooks import BaseState, HookRegistry, ModelHook, StateManager
from torch import nn

from ..errors import AccelError


class ForwardHook(ModelHook):
    """Calls `wrapper(hook, *args, **kwargs)` in place of a module's forward; sees the pipeline's cache context."""

    _is_stateful = True

    def __init__(self, wrapper: Callable):
        super().__init__()
        self.wrapper, self.states = wrapper, StateManager(BaseState)

    def new_forward(self, module: nn.Module, *args, **kwargs):
        return self.wrapper(self, *args, **kwargs)

    @property
    def original(self) -> Callable:
        """The forward that the hook wraps."""
        return self.fn_ref.original_forward

    def reset_state(self, module: nn.Module) -> nn.Module:
        self.states.reset()
        return module


@contextmanager
def wrapped_forward(module: nn.Module, wrapper: Callable) -> Iterator[None]:
    """Put a hook around a module's forward; on exit the module has exactly the attributes it had before.

    Raises AccelError where group offloading would remove the hook in the module's first call.
    """
    had_registry, had_forward = "_diffusers_hook" in module.__dict__, "forward" in module.__dict__
    if had_registry and module._diffusers_hook.get_hook(_LAZY_PREFETCH_GROUP_OFFLOADING):
        raise AccelError(
            "group offloading with streams learns its order in a first call: call the pipeline once before accel.apply"
        )
    registry = HookRegistry.check_if_exists_or_initialize(module)
    registry.register_hook(ForwardHook(wrapper), "accel")
    registry.invalidate_child_registries_cache()
    try:
        yield
    finally:
        registry.remove_hook("accel", recurse=False)
        registry._child_registries_cache = None
        if not had_registry:
            del module._diffusers_hook
        if not had_forward:
            del module.forward


@contextmanager
def reattach_after_offload(pipe, hooks: Callable[[], AbstractContextManager]) -> Iterator[None]:
    """Keep the hooks on the pipeline's models, also over calls of a pipeline whose models are offloaded.

    After each call, an offloaded pipeline removes every hook from its models and adds only its own again. So ours are
    taken off before that and added again after it.
    """
    free = pipe.maybe_free_model_hooks
    with ExitStack() as stack:
        stack.enter_context(hooks())

        def free_and_reattach() -> None:
            if not getattr(pipe, "_all_hooks", None):
                return free()
            stack.close()
            try:
                free()
            finally:
                stack.enter_context(hooks())

        with patched_method(pipe, "maybe_free_model_hooks", free_and_reattach):
            yield


@contextmanager
def patched_method(pipe, name: str, fn: Callable) -> Iterator[None]:
    """Replace a method of the pipeline by a function; on exit the pipeline has exactly the attributes it had before."""
    before = vars(pipe).get(name)
    setattr(pipe, name, fn)
    try:
        yield
    finally:
        delattr(pipe, name)
        if before is not None:
            setattr(pipe, name, before)
