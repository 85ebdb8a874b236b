"""The job behind Run: compare a baseline and an accelerated run from the same noise, and report every step.

Importing this module imports torch, so the page does it only when the first visitor presses Run.
"""

from __future__ import annotations

import re

from accel.core.trace import Trace
from accel.errors import AccelError
from accel.evaluation.compare import compare
from accel.evaluation.metrics import Pair, measure, metrics_of
from accel.runtime.generate import Video, generate, preflight
from accel.runtime.models import ModelDefaults
from accel.runtime.presets import required_settings
from accel.runtime.run import Run, build_run
from ui.preview import ProgressReporter
from ui.video_cache import CachedVideo, VideoCache
from ui.worker import Job


class CompareJob:
    """Generates a baseline and an accelerated video and compares them; a baseline in the cache is reused.

    Emits "started", "step", "pair" and, if asked to, "same_steps_baseline". Raises AccelError for refused settings.
    """

    def __init__(self, model: str, settings: dict, videos: VideoCache, same_steps_baseline: bool = False):
        """`settings`: prompt, seed, steps, guidance and methods of the accelerated run.

        `same_steps_baseline`: also generate the baseline at the step count of the accelerated run.
        """
        self.model, self.settings, self.videos, self.same_steps_baseline = model, settings, videos, same_steps_baseline

    def __call__(self, job: Job, pipe, defaults: ModelDefaults) -> None:
        """Run on the pipeline's thread."""
        a, b = self._runs(defaults)
        same_steps = a.model_copy(update={"steps": b.steps})
        cached = self.videos.baseline(a)
        unknown = _unknown_words(pipe, b.prompt)
        job.emit("started", message=_text([*unknown, *preflight(b, pipe)]), cached=cached is not None)

        reporters = {"a": ProgressReporter(job, pipe, a, "a", "baseline"),
                     "b": ProgressReporter(job, pipe, b, "b", "accelerated")}  # fmt: skip
        files: dict[str, str] = {"a": cached.path} if cached else {}

        def on_step(pane: str, done: int, trace: Trace, latents) -> None:
            if pane == "warm-up":
                job.check()
            else:
                reporters[pane](done, trace, latents)

        def on_video(pane: str, video: Video) -> None:
            if pane == "a":
                files[pane] = self.videos.add_baseline(a, video, defaults.fps).path
            else:
                files[pane] = self.videos.add_accelerated(b, video, defaults.fps)

        result = compare(
            a, b, pipe, defaults, on_step=on_step, on_video=on_video, baseline=cached.video if cached else None
        )
        player = {
            **files, "fps": defaults.fps, "frames": len(result.b.frames), "label_a": _baseline_label(a, cached),
            "label_b": f"{', '.join(b.methods) or 'no method'}, {b.steps} steps",
        }  # fmt: skip
        report = {**result.report, "baseline_measured_at": cached.measured_at if cached else None}
        message = _text([*unknown, *result.b.trace.messages, *self._remarks(a, b, same_steps)])
        job.emit("pair", report=report, player=player, message=message)
        if self.same_steps_baseline and same_steps != a:
            baseline = self._same_steps_baseline(job, same_steps, pipe, defaults)
            label = _same_steps_label(same_steps, baseline, defaults)
            job.emit("same_steps_baseline", player={**player, "a": baseline.path, "label_a": label})

    def _runs(self, defaults: ModelDefaults) -> tuple[Run, Run]:
        """The baseline and the accelerated run. Steps and guidance that a method requires apply to the latter only."""
        integers = {name: _integer(self.settings[name], name) for name in ("seed", "steps")}
        settings = {"model": self.model, **self.settings, **integers}
        baseline = build_run(defaults, **{**settings, "methods": {}})
        return baseline, build_run(defaults, **{**settings, **required_settings(settings["methods"])})

    def _remarks(self, a: Run, b: Run, same_steps: Run) -> list[str]:
        """Where the result differs from what the widgets say."""
        remarks = []
        if b.guidance != a.guidance:
            remarks.append(f"The student's guidance is built in: guidance {a.guidance:g} applies to the baseline alone")
        if self.same_steps_baseline and same_steps == a:
            remarks.append("There is no third video: the baseline already has the accelerated run's step count")
        return remarks

    def _same_steps_baseline(self, job: Job, run: Run, pipe, defaults) -> CachedVideo:
        if cached := self.videos.baseline(run):
            return cached
        reporter = ProgressReporter(job, pipe, run, "a", f"baseline, {run.steps} steps")
        return self.videos.add_baseline(run, generate(run, pipe, defaults, reporter), defaults.fps)


def _baseline_label(run: Run, cached: CachedVideo | None) -> str:
    return f"baseline, {run.steps} steps" + (f" (cached, measured {cached.measured_at})" if cached else "")


def _same_steps_label(run: Run, baseline: CachedVideo, defaults: ModelDefaults) -> str:
    """Step count, time and, of the metrics, those that need no second video."""
    video = baseline.video
    metrics = [metric for metric in metrics_of(defaults) if metric.of_one_video]
    values = measure(Pair(video, video, run.prompt), metrics)
    parts = [f"baseline, {run.steps} steps, {video.seconds['denoise']:.2f} s at {baseline.measured_at}"]
    return ", ".join([*parts, *(f"{metric.format(values[metric.name])} {metric.about}" for metric in metrics)])


def _integer(value, name: str) -> int:
    """A widget's number as an int. Raises AccelError if it is missing or has a fraction."""
    if value is None or float(value) != int(value):
        raise AccelError(f"{name} = {value} is not a whole number")
    return int(value)


def _unknown_words(pipe, prompt: str) -> list[str]:
    """Sentences about words of the prompt that a closed vocabulary lacks; none for an open vocabulary."""
    vocabulary = pipe.tokenizer.get_vocab()
    words = dict.fromkeys(re.findall(r"\w+", prompt.lower()))
    unknown = [word for word in words if word not in vocabulary] if len(vocabulary) < 1000 else []
    return [f"The model does not know: {', '.join(unknown)}", "It ignores unknown words"] if unknown else []


def _text(sentences: list[str]) -> str:
    return " ".join(f"{sentence}." for sentence in sentences)
