"""A visitor's running sweep: one job for each setting, so that the runs of other visitors come in between.

This module imports torch only when the first job runs.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from accel.errors import AccelError
from accel.evaluation.sweep import Cell
from accel.evaluation.sweep_rows import row_of
from ui.context import Context
from ui.sweep_plan import Plan

if TYPE_CHECKING:
    from accel.runtime.run import Run
    from ui.job_queue import Job

PROGRESS_SECONDS = 0.5  # between two reports of the step of one setting


class Result(NamedTuple):
    """What became of a cell: the id and figures of its stored pair, or the reason why it was refused."""

    run_id: str = ""
    row: dict | None = None
    reason: str = ""


@dataclass
class SweepState:
    """A sweep that runs or has ended; its results have the places of the plan's cells."""

    plan: Plan
    results: list[Result | None]
    id: str = field(default_factory=lambda: uuid.uuid4().hex)

    @classmethod
    def of(cls, plan: Plan) -> SweepState:
        """A sweep without results yet."""
        return cls(plan, [None] * len(plan.cells))

    @property
    def done(self) -> list[Result]:
        """The measured results."""
        return [result for result in self.results if result and result.row]

    @property
    def ended(self) -> int:
        """The number of cells that need no more work."""
        return sum(result is not None for result in self.results)


class CellReporter:
    """A step callback of `generate` that emits "step" events for one pane ("a" or "b")."""

    def __init__(self, job: Job, pipe, run: Run, pane: str):
        self.job, self.run, self.pane, self.next_report = job, run, pane, 0.0

    def __call__(self, done: int, *_: Any) -> None:
        """Emit an event if one is due."""
        if time.monotonic() >= self.next_report:
            self.next_report = time.monotonic() + PROGRESS_SECONDS
            self.job.emit("step", pane=self.pane, done=done, steps=self.run.steps)


class CellJob:
    """Generates and stores the pair of one cell; emits "step" and "cell", or "cell_refused" with the reason."""

    def __init__(self, context: Context, visitor: str, group: str, plan: Plan, cell: Cell):
        self.context, self.visitor, self.group, self.plan, self.cell = context, visitor, group, plan, cell

    def __call__(self, job: Job, pipe, defaults) -> None:
        """Run on the pipeline's thread."""
        from ui.compare_job import make_pair

        try:
            a, b = self.plan.runs(self.cell, defaults)
            stored = make_pair(job, self.context, self.visitor, a, b, pipe, defaults, CellReporter, self.group)
        except AccelError as error:
            job.emit("cell_refused", reason=str(error))
            return
        job.emit("cell", run_id=stored.id, row=row_of(self.cell, stored.report))


class Sweep:
    """Runs the cells of a plan one after the other; `stop` ends it within a step and keeps what is measured."""

    def __init__(self, context: Context, visitor: str, plan: Plan):
        self.context, self.visitor, self.state = context, visitor, SweepState.of(plan)
        self.choices: tuple = ()  # quality, speed, earlier results and loss, as the page shows it
        self._stopped = threading.Event()
        self._job: Job | None = None

    def stop(self) -> None:
        """End the sweep. May be called from any thread, also after its end."""
        self._stopped.set()
        if job := self._job:
            self.context.workers.stop(self.visitor, job.id)

    def events(self) -> Iterator[tuple[str, dict]]:
        """("waiting", ...), ("step", index, pane, done, steps) and ("result", index) until ("ended", reason, stopped).

        A cell that is refused does not end the sweep; a worker that takes no jobs does. Closing it stops the sweep.
        """
        plan = self.state.plan
        try:
            for index, cell in enumerate(plan.cells):
                work = CellJob(self.context, self.visitor, self.state.id, plan, cell)
                model, has_begun = plan.common["model"], index > 0
                self._job = self.context.workers.submit(work, self.visitor, model, goes_on=has_begun)
                if self._stopped.is_set():  # between two jobs
                    self.stop()
                for kind, data in self.context.workers.stream(self._job):
                    if kind in ("waiting", "step"):
                        yield kind, {"index": index, **data}
                    elif result := _result(kind, data):
                        self.state.results[index] = result
                        yield "result", {"index": index}
                    elif kind in ("stopped", "refused"):
                        yield "ended", {"reason": data.get("reason", ""), "stopped": kind == "stopped"}
                        return
            yield "ended", {"reason": "", "stopped": False}
        finally:
            self.stop()


def _result(kind: str, data: dict) -> Result | None:
    """What an event says about a cell, if it ends it."""
    if kind == "cell":
        return Result(data["run_id"], data["row"])
    if kind in ("cell_refused", "failed"):
        return Result(reason=data["reason"])
    return None
