"""The three-line interface: methods on a pipeline for the time of a `with` block."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

from ..methods import Method
from .host import Host
from .trace import Trace


@contextmanager
def apply(pipe, methods: Iterable[Method]) -> Iterator[Trace]:
    """The trace of whatever the pipeline runs inside, with the methods (inner to outer) on it.

    Takes a preset or any list of methods; with none, the output is bitwise the plain pipeline's. On exit the
    pipeline is as it was, after an error or a cancelled run too. Raises ValueError for an unknown family.
    """
    trace = Trace()
    host = Host(pipe, trace)
    with ExitStack() as stack:
        stack.enter_context(host.attached())
        for method in methods:
            stack.enter_context(method.apply(host, trace))
        yield trace
