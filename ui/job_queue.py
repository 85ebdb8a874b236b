"""Jobs of the page's visitors, and a queue in which the visitors take turns."""

from __future__ import annotations

import itertools
import queue
import threading
import uuid
from collections import OrderedDict, deque
from collections.abc import Callable
from contextvars import Context, copy_context
from dataclasses import dataclass, field
from typing import Any

from accel.runtime.run import Cancelled

Work = Callable[["Job", Any, Any], None]  # job, pipeline, defaults of its model


@dataclass(eq=False)
class Job:
    """Work for a pipeline's thread. `stop` ends it at the next step, `events` goes to its visitor."""

    work: Work
    visitor: str
    model: str
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    stop: threading.Event = field(default_factory=threading.Event)
    events: queue.SimpleQueue = field(default_factory=queue.SimpleQueue)
    context: Context = field(default_factory=copy_context)  # of the visitor's request
    started: bool = False  # its model is loaded and its work has begun

    def emit(self, kind: str, **data: Any) -> None:
        """Send an event. Raises Cancelled if the visitor has asked to stop."""
        self.events.put((kind, data))
        self.check()

    def check(self) -> None:
        """Raise Cancelled if the visitor has asked to stop."""
        if self.stop.is_set():
            raise Cancelled


class FairQueue:
    """Waiting jobs: visitors take turns, and each visitor's jobs keep their order. Not thread-safe by itself."""

    def __init__(self):
        self._jobs: OrderedDict[str, deque[Job]] = OrderedDict()  # whose turn it is comes first

    def __len__(self) -> int:
        return sum(map(len, self._jobs.values()))

    def put(self, job: Job) -> None:
        """Add a job behind the others of its visitor."""
        self._jobs.setdefault(job.visitor, deque()).append(job)

    def next(self) -> Job | None:
        """The job whose turn it is; it stays in the queue."""
        return next((jobs[0] for jobs in self._jobs.values()), None)

    def take(self) -> Job:
        """Remove and return the job whose turn it is; its visitor goes to the end."""
        visitor, jobs = self._jobs.popitem(last=False)
        job = jobs.popleft()
        if jobs:
            self._jobs[visitor] = jobs
        return job

    def discard(self, job: Job) -> bool:
        """Remove a job if it waits here; says whether it did."""
        jobs = self._jobs.get(job.visitor, ())
        if job not in jobs:
            return False
        jobs.remove(job)
        if not jobs:
            del self._jobs[job.visitor]
        return True

    def of(self, visitor: str) -> list[Job]:
        """The waiting jobs of a visitor, the first one first."""
        return list(self._jobs.get(visitor, ()))

    def all(self) -> list[Job]:
        """All waiting jobs in the order in which they will be taken."""
        rounds = itertools.chain.from_iterable(itertools.zip_longest(*self._jobs.values()))
        return [job for job in rounds if job is not None]
