"""The three-line interface: methods on a pipeline for the time of a `with` block."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Protocol

from .host import Host
from .trace import Trace


class Applicable(Protocol):
    """What `apply` needs of a method."""

    def apply(self, host: Host, trace: Trace) -> AbstractContextManager: ...


@contextmanager
def apply(pipe, methods: Iterable[Applicable]) -> Iterator[Trace]:
    """Run the pipeline with the methods (inner to outer) inside the `with` block; returns the trace of its last run.

    Takes a preset or any list of methods; without methods the output is bitwise the baseline's. On exit the pipeline
    is as it was, also after an error or a cancelled run. Raises AccelError for an unsupported pipeline.
    """
    trace = Trace()
    host = Host(pipe, trace)
    with ExitStack() as stack:
        stack.enter_context(host.attached())
        for method in methods:
            stack.enter_context(method.apply(host, trace))
        yield trace
