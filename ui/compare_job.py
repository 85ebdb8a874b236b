"""The job behind Run: generate a reference and a candidate from the same noise, compare them, and store the pair.

Importing this module imports torch, so the page does it only when the first visitor presses Run.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accel.evaluation.compare import compare
from accel.runtime.generate import Video, preflight
from accel.runtime.models import ModelDefaults
from accel.runtime.presets import required_settings
from accel.runtime.run import Run, parse_run
from accel.runtime.video import write_mp4
from ui.context import Context
from ui.preview import ProgressReporter
from ui.side_settings import Side
from ui.store import Stored
from ui.worker import Job

Reporter = Callable[[str, int, Any, Any], None]  # pane ("a" or "b"), steps done, trace, latents


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
        reporters = {which: ProgressReporter(job, pipe, run, which) for which, run in (("a", a), ("b", b))}
        report_step = lambda pane, *step: reporters[pane](*step)
        stored = make_pair(job, self.context, self.visitor, a, b, pipe, defaults, report_step)
        job.emit(
            "pair", run_id=stored.id, message=sentences([*unknown, *stored.report["trace"]["summary"]["messages"]])
        )


def build_side(defaults: ModelDefaults, settings: dict, side: Side) -> Run:
    """The run of a side. A student's own steps and guidance replace those of the widgets."""
    own = required_settings(side["methods"])
    return parse_run(defaults, {**settings, **side, **own})


def make_pair(
    job: Job, context: Context, visitor: str, a: Run, b: Run, pipe, defaults: ModelDefaults,
    on_step: Reporter | None = None, group: str = "",
) -> Stored:  # fmt: skip
    """Generate a pair (the reference only if it is not kept from before), compare it and store it for its visitor.

    `on_step` is called after each step of either side. Raises AccelError for refused settings, Cancelled after a stop.
    """
    kept, runs = context.references.find(a), {"a": a, "b": b}

    def step(pane: str, done: int, trace, latents) -> None:
        job.check()
        if on_step and pane != "warm-up":
            on_step(pane, done, trace, latents)

    with tempfile.TemporaryDirectory(dir=context.store.folder, prefix="part-") as folder:
        files = {f"{side}.mp4": Path(folder) / f"{side}.mp4" for side in runs}

        def encode(side: str, video: Video) -> None:
            path, settings = files[f"{side}.mp4"], runs[side].model_dump()
            video.seconds["encode"] = write_mp4(path, video.frames, defaults.fps, settings)

        if kept:
            encode("a", kept.video)
        result = compare(a, b, pipe, defaults, on_step=step, on_video=encode, baseline=kept and kept.video)
        if not kept:
            context.references.add(a, result.a)
            if not a.methods:
                context.workers.note_step_seconds(a, result.a.seconds["denoise"] / a.steps)
        report = {
            **result.report, "baseline_measured_at": kept and kept.measured_at, "fps": defaults.fps,
            "reference": a.model_dump(),
        }  # fmt: skip
        files |= {"a.jpg": result.a.race.sheet, "b.jpg": result.b.race.sheet}
        return context.store.find(context.store.add(visitor, report, files, group))


def unknown_words(pipe, prompt: str) -> list[str]:
    """Sentences about words of the prompt that a closed vocabulary lacks; none for an open vocabulary."""
    vocabulary = pipe.tokenizer.get_vocab()
    words = dict.fromkeys(re.findall(r"\w+", prompt.lower()))
    unknown = [word for word in words if word not in vocabulary] if len(vocabulary) < 1000 else []
    return [f"The model does not know: {', '.join(unknown)}", "It ignores unknown words"] if unknown else []


def sentences(texts: list[str]) -> str:
    """Sentences in one line, each with its full stop."""
    return " ".join(f"{text}." for text in texts)
