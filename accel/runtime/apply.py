"""The three-line interface: methods on a pipeline for the time of a `with` block."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ContextDecorator, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from torch import nn

from ..core.calls import running_call
from ..core.hooks import patched_method
from ..core.host import Host
from ..core.trace import Trace
from ..errors import AccelError, quote
from ..families import family_of
from ..methods import Method
from ..methods.base import check_combination, run_spec
from .presets import Preset, checked, load_preset
from .solvers import SCHEDULERS, schedule_shift


def apply(pipe, methods: Any = None) -> Application:
    """A context inside which the pipeline runs with the methods, inner to outer; it gives the trace of the last run.

    `methods` is a preset, a preset's name or file, a method, a method's class (its defaults), or a list of these, the
    innermost first: a student before the caches that act on it. With None or [], the output is bitwise the baseline's.
    Steps, guidance, solver and shift of a preset are not set; the trace's messages name those that a run lacks. The
    methods act inside `with` or in a function that `apply` decorates, and not before. On exit the pipeline is as it
    was, also after an error or a cancelled run. Raises AccelError for anything else, and on entering for a pipeline
    that is not supported or has methods already.
    """
    return Application(pipe, tuple(_parts_of(methods)))


class Application(ContextDecorator):
    """Methods for a pipeline, which act while it is entered; warns if it is thrown away without that."""

    def __init__(self, pipe, parts: tuple[Method | Preset, ...]):
        self.pipe, self.is_used = pipe, True  # until the methods are known to be allowed
        self.methods = tuple(m for part in parts for m in (part if isinstance(part, Preset) else [part]))
        self.presets = tuple(part for part in parts if isinstance(part, Preset))
        self.is_used = False

    def __enter__(self) -> Trace:
        self.is_used = True
        active = _applied(self.pipe, self.methods, self.presets)
        trace = active.__enter__()
        self._active = active
        return trace

    def __exit__(self, *error) -> bool | None:
        return self._active.__exit__(*error)

    def __call__(self, fn):
        self.is_used = True
        kinds = inspect.isgeneratorfunction, inspect.iscoroutinefunction, inspect.isasyncgenfunction
        if any(is_kind(fn) for is_kind in kinds):  # its body runs later, when the methods are gone
            raise AccelError("a generator or an async function cannot be decorated: use `with accel.apply(...)` in it")
        return super().__call__(fn)

    def __del__(self):
        if not self.is_used:
            warnings.warn("accel.apply(...) does nothing by itself: write `with accel.apply(...):`", stacklevel=2)


def _parts_of(given: Any) -> Iterator[Method | Preset]:
    """The methods and presets that `apply` is given. Raises AccelError for what is neither."""
    if isinstance(given, Method | Preset):
        yield given
    elif isinstance(given, type) and issubclass(given, Method):
        yield checked(given, {})
    elif isinstance(given, str | Path):
        yield load_preset(given)
    elif isinstance(given, Iterable) and not isinstance(given, Mapping | bytes | nn.Module):
        for one in given:
            yield from _parts_of(one)
    elif given is not None:
        raise AccelError(
            f"{quote(given)} is no method: give a preset's name, a preset, a method, or a list of these, such as "
            'accel.apply(pipe, ["fastercache"])'
        )


@contextmanager
def _applied(pipe, methods: tuple[Method, ...], presets: tuple[Preset, ...]) -> Iterator[Trace]:
    if isinstance(pipe, nn.Module):
        raise AccelError(f"accel.apply takes a pipeline, not its {type(pipe).__name__}: give the pipeline itself")
    check_combination(methods)
    denoisers, trace = family_of(pipe).denoisers(pipe), Trace()
    with ExitStack() as stack:
        for part in (pipe, *denoisers):
            stack.enter_context(_taken(part))
        splits_batches = not all(method.is_neutral or method.peer for method in methods)
        host = Host(pipe, trace, splits_batches, bool(methods))
        for method in methods:
            stack.enter_context((_announced if method.is_neutral else type(method).apply)(method, host, trace))
        for preset in presets:
            stack.enter_context(_compared(preset, host, trace))
        stack.enter_context(host.attached())
        yield trace


def _announced(method: Method, host: Host, trace: Trace) -> AbstractContextManager[None]:
    """In place of a neutral method, which need not be in the model: each run says that it does nothing."""
    return _told_in_each_run(lambda: method.inactive_reason(run_spec(host)), host, trace)


def _compared(preset: Preset, host: Host, trace: Trace) -> AbstractContextManager[None]:
    """Each run says which settings of a preset it lacks: methods act inside a run and cannot change them."""

    def lacking() -> str:
        running, _ = running_call(host.pipe)  # it may be another one, with this transformer
        scheduler, solver = running.scheduler, SCHEDULERS.get(preset.solver)
        guidance = getattr(running, "guidance_scale", None)
        lacks = {
            "steps": preset.steps not in (None, host.step.count),
            "guidance": guidance is not None and preset.guidance not in (None, guidance),
            "solver": bool(solver) and not isinstance(scheduler, solver),
            "shift": preset.shift not in (None, schedule_shift(scheduler)),
        }
        names = [f"{name} = {getattr(preset, name)}" for name, lacking in lacks.items() if lacking]
        return f"this run does not have the preset's {', '.join(names)}: apply sets methods alone" if names else ""

    if (preset.steps, preset.guidance, preset.solver, preset.shift) == (None, None, "default", None):
        return nullcontext()
    return _told_in_each_run(lacking, host, trace)


@contextmanager
def _told_in_each_run(text: Callable[[], str], host: Host, trace: Trace) -> Iterator[None]:
    """Each run has a text among its messages, made at its first call, unless it is empty."""
    text = host.per_run(text)

    def denoise(inner, x, **inputs):
        if text():
            trace.add_message(text())
        return inner(x, **inputs)

    with host.wrap_denoiser(denoise):
        yield


@contextmanager
def _taken(part) -> Iterator[None]:
    """Inside the context, a second `apply` on a pipeline or transformer is refused, and so is copying or saving it.

    A copy's hooks would run the original, and saved weights could be a student's.
    """

    def refuse(*args, **named):
        raise AccelError("a pipeline cannot be copied or saved inside accel.apply: do that before or after it")

    if vars(part).setdefault("__getstate__", refuse) is not refuse:
        raise AccelError("accel.apply acts on this pipeline already: leave it first, or give all methods in one list")
    try:
        with patched_method(part, "save_pretrained", refuse):
            yield
    finally:
        del vars(part)["__getstate__"]
