"""Progress of a run while it denoises: its first frame, speed and work, as often as is cheap."""

from __future__ import annotations

import time

import torch

from accel.core.trace import Trace
from accel.runtime.preview import preview_image
from accel.runtime.run import Run
from ui.worker import Job

PREVIEW_SECONDS = 0.25  # at least this long between two previews,
PREVIEW_COST_FACTOR = 10  # and at least this many times the duration of a preview


class ProgressReporter:
    """A step callback of `generate` that emits "step" events for one pane ("a" or "b")."""

    def __init__(self, job: Job, pipe, run: Run, which: str):
        self.job, self.pipe, self.run, self.which = job, pipe, run, which
        self.next_preview = 0.0

    def __call__(self, done: int, trace: Trace, latents: torch.Tensor) -> None:
        """Emit a preview if one is due. Raises Cancelled if the visitor has stopped the job."""
        began = time.monotonic()
        if began < self.next_preview and done < self.run.steps:
            return self.job.check()
        self.job.emit(
            "step", which=self.which, done=done, seconds=sum(trace.milliseconds.values()) / 1000,
            work=trace.summary()["flops_ratio"], image=preview_image(self.pipe, latents),
        )  # fmt: skip
        ended = time.monotonic()
        self.next_preview = ended + max(PREVIEW_SECONDS, PREVIEW_COST_FACTOR * (ended - began))
