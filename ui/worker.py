"""One thread owns the pipeline and does all torch work; visitors wait in line and hear of their job by a queue."""

from __future__ import annotations

import itertools
import logging
import queue
import threading
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from accel.runtime.generate import Cancelled
from accel.runtime.models import load_pipeline, model_defaults

log = logging.getLogger(__name__)
POLL_SECONDS = 0.3  # seconds between two looks at the line
MAX_QUEUE = 20  # most jobs that wait; a visitor's event holds one of the server's 40 threads meanwhile


@dataclass
class Job:
    """Work for the pipeline's thread. `stop` ends it at the next step; `tell` sends an event to its visitor."""

    work: Callable[[Job, Any, Any], None]
    number: int = 0
    stop: threading.Event = field(default_factory=threading.Event)
    events: queue.SimpleQueue = field(default_factory=queue.SimpleQueue)

    def emit(self, kind: str, **data: Any) -> None:
        """Send an event; raises Cancelled if the visitor has asked to stop."""
        self.events.put((kind, data))
        self.check()

    def check(self) -> None:
        """Raise Cancelled if the visitor has asked to stop."""
        if self.stop.is_set():
            raise Cancelled


class Worker:
    """Loads a pipeline in the background and runs jobs on it, one after the other."""

    def __init__(self, model: str):
        self.model, self.pipe, self.defaults = model, None, None
        self.load_error: str | None = None  # why the model cannot be used
        self._jobs: queue.SimpleQueue[Job] = queue.SimpleQueue()
        self._numbers, self._done = itertools.count(1), 0
        threading.Thread(target=self._serve, name="pipeline", daemon=True).start()

    @property
    def ready(self) -> bool:
        """Whether the model is loaded."""
        return self.pipe is not None

    def submit(self, work: Callable[[Job, Any, Any], None]) -> Job:
        """Put work(job, pipe, home) in the line, or refuse it where that is too long."""
        if self._jobs.qsize() >= MAX_QUEUE:
            job = Job(work)
            job.events.put(("refused", {"why": f"{MAX_QUEUE} runs are waiting already: try again later"}))
            return job
        job = Job(work, next(self._numbers))
        self._jobs.put(job)
        return job

    def stream(self, job: Job) -> Iterator[tuple[str, dict]]:
        """Events of a job until it ends, with ("waiting", ahead, loading) in between; closing it stops the job."""
        try:
            while True:
                try:
                    kind, data = job.events.get(timeout=POLL_SECONDS)
                except queue.Empty:
                    loading, ahead = not (self.ready or self.load_error), max(0, job.number - self._done - 1)
                    if job.stop.is_set() and (ahead or loading):  # it has not begun, and will not
                        yield "stopped", {}
                        return
                    if job.stop.is_set():
                        yield "stopping", {}
                        continue
                    if ahead or loading:
                        yield "waiting", {"ahead": ahead, "loading": loading}
                    continue
                yield kind, data
                if kind in ("done", "stopped", "refused", "failed"):
                    return
        finally:
            job.stop.set()

    def _serve(self) -> None:
        try:
            self.pipe = load_pipeline(self.model)
            self.defaults = model_defaults(self.pipe, self.model)
        except (ValueError, OSError) as error:
            self.load_error = str(error)
        except Exception as error:
            log.exception("the model could not be loaded")
            self.load_error = f"{self.model} could not be loaded ({type(error).__name__}); the server's log says more"
        while True:
            job = self._jobs.get()
            try:
                self._run_job(job)
            finally:
                self._done = job.number

    def _run_job(self, job: Job) -> None:
        if self.load_error:
            job.events.put(("refused", {"why": self.load_error}))
            return
        try:
            if job.stop.is_set():
                raise Cancelled
            job.work(job, self.pipe, self.defaults)
            job.events.put(("done", {}))
        except Cancelled:
            job.events.put(("stopped", {}))
        except (ValueError, OSError) as error:
            job.events.put(("refused", {"why": str(error)}))
        except Exception:
            name = f"{hash(traceback.format_exc()) & 0xFFFF:04x}"
            log.exception("job %d failed, error %s", job.number, name)
            job.events.put(("failed", {"name": name}))
