"""One thread owns the pipeline and does all torch work. Visitors queue, and follow their job by its events."""

from __future__ import annotations

import itertools
import logging
import queue
import threading
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from accel.errors import AccelError
from accel.runtime.run import Cancelled

log = logging.getLogger(__name__)
POLL_SECONDS = 0.3  # between two looks at the queue
MAX_QUEUE = 20  # waiting jobs; each occupies one of the server's 40 threads
FINAL_EVENTS = ("done", "stopped", "refused", "failed")


@dataclass
class Job:
    """Work for the pipeline's thread. `stop` ends it at the next step, `events` goes to its visitor."""

    work: Callable[[Job, Any, Any], None]
    number: int = 0
    stop: threading.Event = field(default_factory=threading.Event)
    events: queue.SimpleQueue = field(default_factory=queue.SimpleQueue)

    def emit(self, kind: str, **data: Any) -> None:
        """Send an event. Raises Cancelled if the visitor has asked to stop."""
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
        self._numbers, self._finished = itertools.count(1), 0

    def start(self) -> None:
        """Start loading the model. Jobs that were submitted before run afterwards."""
        threading.Thread(target=self._serve, name="pipeline", daemon=True).start()

    def submit(self, work: Callable[[Job, Any, Any], None]) -> Job:
        """Queue work(job, pipe, defaults), or refuse it if the queue is full."""
        if self._jobs.qsize() >= MAX_QUEUE:
            job = Job(work)
            job.events.put(("refused", {"reason": f"{MAX_QUEUE} runs are waiting already: try again later"}))
            return job
        job = Job(work, next(self._numbers))
        self._jobs.put(job)
        return job

    def stream(self, job: Job) -> Iterator[tuple[str, dict]]:
        """Events of a job until it ends, with ("waiting", ahead, loading) in between. Closing it stops the job."""
        try:
            while True:
                try:
                    event = job.events.get(timeout=POLL_SECONDS)
                except queue.Empty:
                    event = self._status(job)
                if event:
                    yield event
                if event and event[0] in FINAL_EVENTS:
                    return
        finally:
            job.stop.set()

    def _status(self, job: Job) -> tuple[str, dict] | None:
        """What to say of a job that has sent nothing for a while; None if it is running."""
        loading = self.pipe is None and not self.load_error
        ahead = max(0, job.number - self._finished - 1)
        if job.stop.is_set():
            return ("stopped" if ahead or loading else "stopping"), {}  # a job that has not started never will
        return ("waiting", {"ahead": ahead, "loading": loading}) if ahead or loading else None

    def _serve(self) -> None:
        self._load()
        while True:
            job = self._jobs.get()
            try:
                self._run_job(job)
            finally:
                self._finished = job.number

    def _load(self) -> None:
        from accel.runtime import models

        try:
            pipe = models.load_pipeline(self.model)
            self.defaults, self.pipe = models.model_defaults(pipe, self.model), pipe
        except AccelError as error:
            self.load_error = str(error)
        except Exception as error:
            log.exception("the model could not be loaded")
            self.load_error = f"{self.model} could not be loaded ({type(error).__name__}): see the server's log"

    def _run_job(self, job: Job) -> None:
        if self.load_error:
            job.events.put(("refused", {"reason": self.load_error}))
            return
        try:
            job.check()
            job.work(job, self.pipe, self.defaults)
            job.events.put(("done", {}))
        except Cancelled:
            job.events.put(("stopped", {}))
        except AccelError as error:
            job.events.put(("refused", {"reason": str(error)}))
        except Exception:
            error_id = f"{hash(traceback.format_exc()) & 0xFFFF:04x}"
            log.exception("job %d failed, error %s", job.number, error_id)
            job.events.put(("failed", {"error_id": error_id}))
