"""Computes tasks where the GPU is: in this process, or on a ZeroGPU Space in one that is forked while a visitor has it.

The two processes share a folder. The task, its events, its result and the request to stop are pickled files in it, so
nothing that belongs to one process crosses. The weights are read here and moved to the GPU there.
"""

from __future__ import annotations

import math
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextvars import Context
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import gradio as gr

from accel.errors import AccelError
from accel.files import atomic_write
from accel.runtime.run import Cancelled, Run

if TYPE_CHECKING:
    from accel.runtime.estimate import StepSeconds
    from ui.job_queue import Job

ACTIVE = os.environ.get("SPACES_ZERO_GPU", "").lower() in ("1", "t", "true")  # as the package `spaces` reads it
if ACTIVE:
    import spaces  # before torch, of which it replaces parts

GIGABYTES = 48  # memory of the GPU that a visitor gets
START_SECONDS = 15  # for the weights' way to the GPU, decoding, metrics and files
MARGIN = 1.25  # on the seconds of denoising: a run that takes longer than was asked for is killed
FLOPS_PER_SECOND = 1e14  # until a step was measured; half of what an H200 reaches, as the GPU is half of a card
POLL_SECONDS = 0.1
_loaded: dict[str, Any] = {}  # pipelines of small models and the last large one, as they were at a process's fork


class Task(Protocol):
    """A computation that can be pickled: its runs, all of one model, and a call that may emit events."""

    runs: Sequence[Run]

    def __call__(self, job: Job | Border, pipe, defaults) -> Any:
        """The result, which can be pickled too."""


def load_pipeline(model: str, device: str | None):
    """The pipeline of a model, see `accel.runtime.models.load_pipeline`; on ZeroGPU in this process's memory."""
    from accel.runtime import models

    if not ACTIVE:
        return models.load_pipeline(model, device)
    import torch

    for other in replaced_by(model, [*_loaded]):
        del _loaded[other]
    dtype = torch.float32 if is_small(model) else torch.bfloat16
    _loaded[model] = models.load_pipeline(model, "cpu", dtype)
    return _loaded[model]


def is_small(model: str) -> bool:
    """Whether a model is one of the toy world, of a few megabytes: it stays loaded beside a large one."""
    from accel.runtime.models import read_defaults

    own = read_defaults(model)
    return own is not None and own.toy_world


def replaced_by(model: str, loaded: Sequence[str]) -> list[str]:
    """Those of the loaded models that are freed before another one is loaded: large ones, for a large one."""
    return [] if is_small(model) else [other for other in loaded if not is_small(other)]


def compute(task: Task, job: Job, pipe, defaults, step_seconds: StepSeconds) -> Any:
    """The result of a task; its events go to the job. Raises what the task raises, Cancelled after a stop.

    `step_seconds` tells what a step takes, to ask ZeroGPU for no more seconds than needed. Raises AccelError if it
    refuses them.
    """
    if not ACTIVE:
        return task(job, pipe, defaults)
    seconds = gpu_seconds(task.runs, pipe, step_seconds)
    with tempfile.TemporaryDirectory(prefix="task-") as folder, ThreadPoolExecutor(1) as pool:
        border = Border(Path(folder))
        border.write("task", task)
        running = pool.submit(_ask_for_gpu, job.context, folder, seconds)
        while not wait([running], POLL_SECONDS).done:
            border.exchange(job)
        running.result()
        border.exchange(job)
        result = border.read("result")
    if isinstance(result, Exception):
        raise result
    return result


def gpu_seconds(runs: Sequence[Run], pipe, step_seconds: StepSeconds) -> int:
    """Seconds to ask ZeroGPU for: those of the runs, of two steps to warm up, and of the start."""
    from accel.runtime.estimate import estimate, step_flops

    guess = lambda run: step_flops(run, pipe) / FLOPS_PER_SECOND
    expect = lambda run: estimate(run, pipe, step_seconds).seconds or estimate(run, pipe, guess).seconds
    warm_up = runs[-1].model_copy(update={"steps": 2, "methods": {}})
    return math.ceil(START_SECONDS + MARGIN * sum(map(expect, (warm_up, *runs))))


@dataclass(frozen=True)
class Border:
    """The folder between the two processes; a task that has the GPU gets it in place of its `Job`."""

    folder: Path

    def emit(self, kind: str, **data: Any) -> None:
        """Send an event. Raises Cancelled if the visitor has asked to stop."""
        self.write(f"{time.monotonic_ns():020}.event", (kind, data))
        self.check()

    def check(self) -> None:
        """Raise Cancelled if the visitor has asked to stop."""
        if (self.folder / "stop").exists():
            raise Cancelled

    def exchange(self, job: Job) -> None:
        """Hand new events to the job, and its visitor's wish to stop to the task."""
        if job.stop.is_set():
            (self.folder / "stop").touch()
        for file in sorted(self.folder.glob("[0-9]*.event")):
            job.events.put(self.read(file.name))
            file.unlink()

    def write(self, name: str, value: Any) -> None:
        """Put a value into the folder, where it appears complete."""
        with atomic_write(self.folder / name) as part:
            part.write_bytes(pickle.dumps(value))

    def read(self, name: str) -> Any:
        """A value of the folder."""
        return pickle.loads((self.folder / name).read_bytes())


def _ask_for_gpu(context: Context, folder: str, seconds: int) -> None:
    """Run the task of a folder in the context of the visitor's request, whose quota the seconds are taken from."""
    try:
        context.run(_run_on_gpu, folder, seconds)
    except gr.Error as error:  # of the package `spaces`: no quota, no GPU, killed
        raise AccelError(f"{str(error.message).strip().rstrip('.')} ({seconds} s of GPU time were asked for)") from None


def _gpu(function: Callable[[str, int], None]) -> Callable[[str, int], None]:
    return spaces.GPU(function, duration=lambda folder, seconds: seconds) if ACTIVE else function


@_gpu
def _run_on_gpu(folder: str, seconds: int) -> None:
    """Compute the task of a folder, in the process that has the GPU for so many seconds."""
    border = Border(Path(folder))
    try:
        task = border.read("task")
        border.check()
        result = task(border, *_pipeline_on_gpu(task.runs[-1].model))
    except Exception as error:
        error.add_note(traceback.format_exc())  # the other process logs it
        result = error
    border.write("result", result)


def _pipeline_on_gpu(model: str) -> tuple[Any, Any]:
    """A model's pipeline on this process's GPU, and its defaults."""
    import torch

    from accel.runtime.models import model_defaults

    torch.set_num_threads(1)  # OpenMP would wait for its threads, which the fork has left behind
    pipe = _loaded.get(model) or load_pipeline(model, None)  # this process may be older than the choice of the model
    return pipe.to("cuda" if torch.cuda.is_available() else "cpu"), model_defaults(pipe, model)
