"""Compares two runs from the same noise, generated in turn: speed, work and the difference of their videos."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import cycle

import numpy as np
import torch

from ..core.trace import Trace
from ..runtime.generate import Video, environment, generate, warm_up
from ..runtime.models import ModelDefaults
from ..runtime.preview import RaceRecorder
from ..runtime.run import Run
from .metrics import Pair, metrics_of, report_metrics


@dataclass
class Comparison:
    """A baseline a and an accelerated run b of the same noise: their last videos, and the content of `run.json`.

    `a.race.sheet` and `b.race.sheet` are JPEGs of the previews that the report's "race" gives the times of.
    """

    a: Video
    b: Video
    report: dict = field(repr=False)


def compare(
    a: Run,
    b: Run,
    pipe,
    defaults: ModelDefaults,
    repeats: int = 1,
    on_step: Callable[[str, int, Trace, torch.Tensor], None] | None = None,
    on_video: Callable[[str, Video], None] | None = None,
    baseline: Video | None = None,
) -> Comparison:
    """Generate runs a and b in turn, `repeats` times, after a warm-up; measure speed, work and quality of b against a.

    `on_step(pane, steps done, trace, latents)` is called after each step; the pane is "warm-up", "a" or "b".
    `on_video(pane, video)` is called for each generated video and may add a stage to `video.seconds`.
    `baseline`: a video of run a that was generated before, with its seconds; run a is then not generated again.
    """
    videos: dict[str, Video] = {} if baseline is None else {"a": baseline}
    seconds = {"a": [video.seconds for video in videos.values()], "b": []}
    runs = {"a": a, "b": b} if baseline is None else {"b": b}
    recorders: dict[str, RaceRecorder] = {}  # of the last repeat
    callback = lambda pane: (lambda *step: on_step(pane, *step)) if on_step else None
    warm_up(b, pipe, defaults, callback("warm-up"))
    for _ in range(repeats):
        for pane, run in runs.items():
            recorders[pane] = RaceRecorder(run.steps, callback(pane))
            videos[pane] = generate(run, pipe, defaults, recorders[pane])
            if on_video:
                on_video(pane, videos[pane])
            seconds[pane].append(videos[pane].seconds)
    for pane, recorder in recorders.items():
        videos[pane].race = recorder.finish(pipe, videos[pane].seconds["denoise"])
    return Comparison(videos["a"], videos["b"], report(a, b, videos["a"], videos["b"], seconds, pipe, defaults))


def report(a: Run, b: Run, video_a: Video, video_b: Video, seconds: dict, pipe, defaults: ModelDefaults) -> dict:
    """Everything measured on a pair, JSON-ready.

    `seconds`: {"a": [...], "b": [...]}, a {stage: seconds} for each repeat; a baseline measured once has one entry.
    Speed-ups are ratios of medians; `baseline_jitter` is the slowest over the fastest baseline.
    """
    stages = {p: {s: [round(r[s], 4) for r in seconds[p]] for s in seconds[p][0]} for p in "ab"}
    total = {p: np.median([sum(r.values()) for r in seconds[p]]) for p in "ab"}
    denoise = {p: np.median(stages[p]["denoise"]) for p in "ab"}
    flops = {"a": video_a.trace.flops_computed_and_full()[0], "b": video_b.trace.flops_computed_and_full()[0]}
    work, speed = flops["b"] / flops["a"], float(denoise["a"] / denoise["b"])
    if video_a.noise_state != video_b.noise_state:
        video_b.trace.add_message(
            "The scheduler draws new noise at each step, and the two runs did not draw the same: a part of their "
            "difference comes from that"
        )
    pair = Pair(video_a, video_b, b.prompt)
    speedups = [x["denoise"] / y["denoise"] for x, y in zip(cycle(seconds["a"]), seconds["b"])]
    return {
        **b.model_dump(),
        "reference": a.model_dump(),
        "steps_a": a.steps,
        "guidance_a": a.guidance,
        "fps": defaults.fps,
        **environment(pipe),
        **stages,
        "speedup_denoise": speed,
        "speedup_range": [min(speedups), max(speedups)],
        "baseline_jitter": max(stages["a"]["denoise"]) / min(stages["a"]["denoise"]),
        "speedup_total": float(total["a"] / total["b"]),
        "work_ratio": work,
        "efficiency": speed * work,
        "bit_equal": pair.bit_equal if pair.same_shape else None,
        "ssim_frames": [round(float(ssim), 5) for ssim in pair.ssim_frames] if pair.same_shape else None,
        **report_metrics(pair, metrics_of(defaults)),
        "race": {p: video.race and video.race.to_json() for p, video in (("a", video_a), ("b", video_b))},
        "trace": video_b.trace.to_json(),
    }
