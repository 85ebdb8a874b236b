"""One thread per device owns a pipeline and does all torch work. Visitors take turns, and follow their jobs' events."""

from __future__ import annotations

import gc
import json
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from statistics import median
from types import MappingProxyType
from typing import Any

from accel.errors import AccelError, explain_os_error
from accel.runtime.presets import RUN_SETTINGS
from accel.runtime.repeat import changed_methods
from accel.runtime.run import Cancelled
from ui import zero_gpu
from ui.job_queue import FairQueue, Job, Work
from ui.panels import unexpected

log = logging.getLogger(__name__)
POLL_SECONDS = 0.3  # between two looks at a job's events
MAX_WAITING = 20  # jobs of all visitors; each occupies one of the server's 40 threads
MAX_WAITING_PER_VISITOR = 3
FINAL_EVENTS = ("done", "stopped", "refused", "failed")
MEASURED_STEPS = 9  # of each size, of which the median counts


class Workers:
    """A thread and a pipeline for each device. Jobs name their model; a worker loads it if it has another one."""

    def __init__(
        self, model: str, devices: Sequence[str | None] = (None,), models: Mapping[str, str] = MappingProxyType({})
    ):
        """`model` is loaded first; jobs may name it or one of `models`, which say why they cannot run, or nothing.

        `devices`: such as ("cuda:0", "cuda:1"), all of one kind; None is the GPU if there is one, else the CPU.
        """
        self.model, self.models, self.devices = model, {model: "", **models}, tuple(devices)
        self.loaded: dict[tuple[str | None, str], tuple[Any, Any]] = {}  # by device and model: pipeline, defaults
        self._step_seconds: dict[tuple, deque[float]] = {}
        self._work: dict[str, float] = {}
        self._durations: deque[float] = deque(maxlen=20)  # seconds of jobs that ended by themselves
        self._queue, self._changed = FairQueue(), threading.Condition()
        self._running: dict[str | None, tuple[Job, float]] = {}  # by device: job, when it was taken
        self._closed = False
        self._being_loaded = {model}  # the first one from the start on
        self._loading = threading.Lock()  # two threads must not import diffusers at once

    def start(self) -> None:
        """Start loading the model. Jobs that were submitted before run afterwards."""
        for device in self.devices:
            threading.Thread(target=self._serve, args=(device,), name=f"pipeline {device}", daemon=True).start()

    def close(self, timeout: float = 3) -> None:
        """Stop all jobs, take no more, and wait up to `timeout` seconds for those that run."""
        with self._changed:
            self._closed = True
            for job in [*self._queue.all(), *(job for job, _ in self._running.values())]:
                self._stop(job)
            self._changed.wait_for(lambda: not self._running, timeout)

    def submit(self, work: Work, visitor: str = "", model: str | None = None, goes_on: bool = False) -> Job:
        """Queue work(job, pipe, defaults); it is only "refused" if the model is unknown, or if too many wait.

        Work that goes on with what was begun is queued even then.
        """
        job = Job(work, visitor, model or self.model)
        with self._changed:
            if reason := self._refusal(job, goes_on):
                job.events.put(("refused", {"reason": reason}))
            else:
                self._queue.put(job)
                self._changed.notify_all()
        return job

    def stop(self, visitor: str, job_id: str | None = None) -> int:
        """Stop a visitor's jobs, or one of them; returns how many. A waiting job frees its place at once."""
        with self._changed:
            running = [job for job, _ in self._running.values() if job.visitor == visitor]
            stopped = [job for job in [*self._queue.of(visitor), *running] if job_id in (None, job.id)]
            for job in stopped:
                self._stop(job)
        return len(stopped)

    def stream(self, job: Job) -> Iterator[tuple[str, dict]]:
        """Events of a job until it ends, and ("waiting", ahead, loading, seconds) before. Closing it stops the job."""
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
            with self._changed:
                self._stop(job)

    def is_loading(self, model: str) -> bool:
        """Whether a device is loading a model, or is going to without a job."""
        return model in self._being_loaded

    def pipeline(self, model: str) -> tuple[Any, Any] | None:
        """A pipeline of a model and its defaults, to read sizes from, never to run; None if none is loaded."""
        return next((loaded for (_, name), loaded in list(self.loaded.items()) if name == model), None)

    def note_step_seconds(self, run, seconds: float) -> None:
        """Remember what a full step of a run's size took on this machine."""
        self._step_seconds.setdefault(_size(run), deque(maxlen=MEASURED_STEPS)).append(seconds)

    def step_seconds(self, run) -> float | None:
        """Median seconds of a full step of a run's size; None before one was measured."""
        measured = self._step_seconds.get(_size(run))
        return median(measured) if measured else None

    def note_work(self, report: Mapping[str, Any]) -> None:
        """Remember which share of FLOPs the settings of a pair's candidate left."""
        self._work[_settings(report)] = report["trace"]["summary"]["flops_ratio"]

    def work(self, run) -> float | None:
        """The share of FLOPs that the settings of a run left with the last prompt; None before it was measured."""
        return self._work.get(_settings(run.model_dump()))

    def _refusal(self, job: Job, goes_on: bool) -> str | None:
        """Why a job is not queued; None if it is."""
        if self._closed:
            return "the server is being stopped"
        if job.model not in self.models:
            usable = [model for model, reason in self.models.items() if not reason]
            return f"the model {job.model[:80]!r} is not offered here; there are {', '.join(usable)}"
        if self.models[job.model]:
            return self.models[job.model]
        if goes_on:
            return None
        if len(self._queue) >= MAX_WAITING:
            return f"{MAX_WAITING} runs are waiting already: try again later"
        if len(self._queue.of(job.visitor)) >= MAX_WAITING_PER_VISITOR:
            return f"{MAX_WAITING_PER_VISITOR} of your runs are waiting already: stop one or wait"
        return None

    def _stop(self, job: Job) -> None:
        """Stop a job; one that has not started ends at once, also while its model is being loaded."""
        job.stop.set()
        loading = not job.started and any(job is running for running, _ in self._running.values())
        if self._queue.discard(job) or loading:
            job.events.put(("stopped", {}))

    def _status(self, job: Job) -> tuple[str, dict] | None:
        """What to say of a job that has sent nothing for a while; None if it is running as usual."""
        with self._changed:
            if job.started:
                return ("stopping", {}) if job.stop.is_set() else None
            order = self._queue.all()
            if job not in order:  # it was taken, and its model is being loaded
                return "waiting", {"ahead": 0, "loading": True, "seconds": None}
            ahead = order.index(job) + len(self._running)
            return "waiting", {"ahead": ahead, "loading": not self.loaded, "seconds": self._wait(order.index(job))}

    def _wait(self, ahead: int) -> float | None:
        """Seconds until a device is free for a job with so many waiting before it, as far as earlier jobs tell."""
        if not self._durations:
            return None
        usual, now = median(self._durations), time.monotonic()
        left = sum(max(0.0, usual - (now - began)) for _, began in self._running.values())
        return (left + usual * ahead) / len(self.devices)

    def _serve(self, device: str | None) -> None:
        """The thread of a device: load the first model, then run jobs for ever."""
        self._guard(Job(lambda *_: None, "", self.model), device)
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._may_take(device))
                job, began = self._queue.take(), time.monotonic()
                self._running[device] = job, began
            final = self._guard(job, device)
            with self._changed:
                del self._running[device]
                if final == "done":
                    self._durations.append(time.monotonic() - began)
                self._changed.notify_all()

    def _may_take(self, device: str | None) -> bool:
        """Whether a device is the one for the next job: it has the job's model, or no idle device has."""
        job = self._queue.next()
        if job is None:
            return False
        having = [other for other, model in self.loaded if model == job.model]
        return device in having or all(other in self._running for other in having)

    def _guard(self, job: Job, device: str | None) -> str:
        """Run a job and send its final event, whatever happens; returns that event's kind."""
        try:
            job.check()
            pipe, defaults = self._load(job.model, device)
            with self._changed:
                job.started = not job.stop.is_set()
            job.check()
            job.work(job, pipe, defaults)
            final = "done", {}
        except Cancelled:
            final = "stopped", {}
        except AccelError as error:
            final = "refused", {"reason": str(error)}
            if error.__cause__:  # such as a model that cannot be loaded: its owner wants to know more
                log.error("job %s was refused", job.id, exc_info=error)
        except Exception as error:
            final = _explain(error, job)
        job.events.put(final)
        if final[0] != "done":  # outside of the except clauses, whose exception would keep the run's tensors
            _free_memory()
        return final[0]

    def _load(self, model: str, device: str | None) -> tuple[Any, Any]:
        """The pipeline of a model on a device, and the model's defaults; another large model is freed first."""
        if loaded := self.loaded.get((device, model)):
            return loaded
        with self._changed:
            for other in zero_gpu.replaced_by(model, [name for place, name in self.loaded if place == device]):
                del self.loaded[device, other]
            self._being_loaded.add(model)
        try:
            pipe, defaults = self._load_anew(model, device)
            with self._changed:
                self.loaded[device, model] = pipe, defaults
        finally:
            with self._changed:
                self._being_loaded.discard(model)
                self._changed.notify_all()
        return pipe, defaults

    def _load_anew(self, model: str, device: str | None) -> tuple[Any, Any]:
        with self._loading:
            from accel.runtime import models

            _free_memory()
            _use(device)
            pipe = zero_gpu.load_pipeline(model, device)
            defaults = models.model_defaults(pipe, model)
        quick = defaults.toy_world or pipe.device.type == "cuda"  # elsewhere a step may take minutes
        if quick and not zero_gpu.ACTIVE:  # there, only a visitor has the GPU
            self._measure_step(model, pipe, defaults)
        return pipe, defaults

    def _measure_step(self, model: str, pipe, defaults) -> None:
        """Time a guided step of the baseline at the model's own size; this warms the pipeline up too."""
        from accel.runtime.generate import generate
        from accel.runtime.run import build_run

        run = build_run(defaults, model=model, prompt="a video", steps=3)
        trace = generate(run, pipe, defaults).trace
        self.note_step_seconds(run, median(list(trace.milliseconds.values())[1:]) / 1000)


def _size(run) -> tuple:
    """What the time of a full step depends on."""
    return run.model, run.height, run.width, run.frames, run.guidance > 1


def _settings(run: Mapping[str, Any]) -> str:
    """All of a run but prompt and seed."""
    names = ("model", "height", "width", "frames", *RUN_SETTINGS)
    return json.dumps([*(run.get(name) for name in names), changed_methods(run["methods"])], sort_keys=True)


def _explain(error: Exception, job: Job) -> tuple[str, dict]:
    """The final event of an exception that was not raised for the visitor; the log has all of it."""
    if isinstance(error, OSError) and error.errno is not None:
        log.error("job %s failed", job.id, exc_info=error)
        return "refused", {"reason": explain_os_error(error, "a file of this run")}
    if _is_out_of_memory(error):
        log.error("job %s failed", job.id, exc_info=error)
        return "failed", {"reason": "there is not enough memory: choose a smaller model, or methods that hold less"}
    log.error("job %s failed, error %s", job.id, job.id[:8], exc_info=error)
    return "failed", {"reason": unexpected(job.id[:8])}


def _is_out_of_memory(error: Exception) -> bool:
    import torch

    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _use(device: str | None) -> None:
    """Make a GPU the one whose name and memory this thread is told; models are moved to it by its name."""
    import torch

    if device and device.startswith("cuda"):
        torch.cuda.set_device(device)


def _free_memory() -> None:
    """Give back the memory of a failed job, or of a model that was dropped."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
