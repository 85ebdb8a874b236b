"""The job behind Run: generate a reference and a candidate from the same noise, compare them, and store the pair.

Importing this module imports torch, so the page does it only when the first visitor presses Run.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accel.evaluation.compare import Comparison, compare
from accel.runtime.generate import Video, preflight
from accel.runtime.models import ModelDefaults
from accel.runtime.presets import required_settings
from accel.runtime.run import Run, parse_run
from accel.runtime.video import write_mp4
from ui import zero_gpu
from ui.context import Context
from ui.progress_reporter import ProgressReporter
from ui.side_settings import Side
from ui.store import Stored
from ui.worker import Job

Reporter = Callable[[Any, Any, Run, str], Callable]  # job, pipeline, run, pane ("a" or "b") -> a step callback


class CompareJob:
    """Generates and stores a pair, and emits "started", "step" and "pair". Raises AccelError for refused settings."""

    def __init__(self, context: Context, visitor: str, settings: dict, reference: Side, candidate: Side):
        """`settings`: model, prompt and seed of both sides."""
        self.context, self.visitor, self.settings = context, visitor, settings
        self.reference, self.candidate = reference, candidate

    def __call__(self, job: Job, pipe, defaults: ModelDefaults) -> None:
        """Run on the pipeline's thread."""
        a, b = (build_side(defaults, self.settings, side) for side in (self.reference, self.candidate))
        cached = self.context.references.find(a) is not None
        unknown = unknown_words(pipe, b.prompt)
        job.emit("started", message=sentences([*unknown, *preflight(b, pipe)]), cached=cached, a=a, b=b)
        stored = make_pair(job, self.context, self.visitor, a, b, pipe, defaults, ProgressReporter)
        job.emit(
            "pair", run_id=stored.id, message=sentences([*unknown, *stored.report["trace"]["summary"]["messages"]])
        )


def build_side(defaults: ModelDefaults, settings: dict, side: Side) -> Run:
    """The run of a side. What its methods require replaces what the widgets say."""
    return parse_run(defaults, {**settings, **side, **required_settings(side["methods"])})


def make_pair(
    job: Job, context: Context, visitor: str, a: Run, b: Run, pipe, defaults: ModelDefaults,
    reporter: Reporter | None = None, group: str = "",
) -> Stored:  # fmt: skip
    """Generate a pair (the reference only if it is not kept from before), compare it and store it for its visitor.

    `reporter` makes the step callback of each side. Raises AccelError for refused settings, Cancelled after a stop.
    """
    kept = context.references.find(a)
    with tempfile.TemporaryDirectory(dir=context.store.folder, prefix="part-") as folder:
        task = PairTask(a, b, Path(folder), kept and kept.video, reporter)
        result = zero_gpu.compute(task, job, pipe, defaults, context.workers.step_seconds)
        if not kept:
            context.references.add(a, result.a)
            if not a.methods:
                context.workers.note_step_seconds(a, result.a.seconds["denoise"] / a.steps)
        context.workers.note_work(result.report)
        report = {
            **result.report, "baseline_measured_at": kept and kept.measured_at, "fps": defaults.fps,
            "reference": a.model_dump(),
        }  # fmt: skip
        files = {f"{pane}.mp4": task.file(pane) for pane in "ab"}
        files |= {"a.jpg": result.a.race.sheet, "b.jpg": result.b.race.sheet}
        return context.store.find(context.store.add(visitor, report, files, group))


@dataclass(frozen=True)
class PairTask:
    """Generates a pair, or its candidate where the reference is kept, writes its mp4 files to a folder, compares it.

    It can be pickled, and so can its result.
    """

    a: Run
    b: Run
    folder: Path
    kept: Video | None
    reporter: Reporter | None

    @property
    def runs(self) -> list[Run]:
        """Those that are generated."""
        return [self.b] if self.kept else [self.a, self.b]

    def file(self, pane: str) -> Path:
        """The video of a pane."""
        return self.folder / f"{pane}.mp4"

    def __call__(self, job, pipe, defaults: ModelDefaults) -> Comparison:
        """Compute it where the GPU is."""
        runs = {"a": self.a, "b": self.b}
        reporters = {pane: self.reporter(job, pipe, run, pane) for pane, run in runs.items()} if self.reporter else {}

        def step(pane: str, *state) -> None:
            job.check()
            if pane in reporters:  # not in the warm-up
                reporters[pane](*state)

        def encode(pane: str, video: Video) -> None:
            settings = runs[pane].model_dump()
            video.seconds["encode"] = write_mp4(self.file(pane), video.frames, defaults.fps, settings)

        if self.kept:
            encode("a", self.kept)
        return compare(self.a, self.b, pipe, defaults, on_step=step, on_video=encode, baseline=self.kept)


def unknown_words(pipe, prompt: str) -> list[str]:
    """Sentences about words of the prompt that a closed vocabulary lacks; none for an open vocabulary."""
    vocabulary = pipe.tokenizer.get_vocab()
    words = dict.fromkeys(re.findall(r"\w+", prompt.lower()))
    unknown = [word for word in words if word not in vocabulary] if len(vocabulary) < 1000 else []
    return [f"The model does not know: {', '.join(unknown)}", "It ignores unknown words"] if unknown else []


def sentences(texts: list[str]) -> str:
    """Sentences in one line, each with its full stop."""
    return " ".join(f"{text}." for text in texts)
