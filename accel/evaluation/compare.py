"""Two runs from the same noise, generated in turn: their speed, work and how far apart their videos are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

from ..core.trace import Trace
from ..runtime.generate import Run, Video, environment, generate, warm_up
from ..runtime.models import ModelDefaults
from ..world.judge import score
from .metrics import distance


@dataclass
class Comparison:
    """Two runs of the same noise: the videos of the last repeat, and the report that becomes `run.json`."""

    a: Video
    b: Video
    report: dict = field(repr=False)


def compare(
    a: Run, b: Run, pipe, defaults: ModelDefaults, repeats: int = 1,
    on_step: Callable[[str, int, Trace, torch.Tensor], None] | None = None,
    on_video: Callable[[str, Video], None] | None = None,
) -> Comparison:  # fmt: skip
    """Generate a and b in turn, `repeats` times, after a warm-up, and measure speed, work and likeness.

    `on_step(pane, steps done, trace, latents)` hears of both, `on_video(pane, video)` of each result, to whose seconds
    it may add a stage; the pane is "a" or "b". `noise_a` is the slowest over the fastest of equal plain runs.
    """
    seconds: dict[str, list[dict[str, float]]] = {"a": [], "b": []}
    videos: dict[str, Video] = {}
    warm_up(b, pipe, defaults)
    for _ in range(repeats):
        for pane, run in (("a", a), ("b", b)):
            hear = (lambda *args, pane=pane: on_step(pane, *args)) if on_step else None
            videos[pane] = generate(run, pipe, defaults, hear)
            if on_video:
                on_video(pane, videos[pane])
            seconds[pane].append(videos[pane].seconds)
    return Comparison(videos["a"], videos["b"], report(a, b, videos["a"], videos["b"], seconds, pipe, defaults))


def report(a: Run, b: Run, video_a: Video, video_b: Video, seconds: dict, pipe, defaults: ModelDefaults) -> dict:
    """All that is known of a pair, JSON-ready. Times are lists, one entry a repeat; speeds are of their medians."""
    stages = {p: {s: [round(r[s], 4) for r in seconds[p]] for s in seconds[p][0]} for p in "ab"}
    total = {p: np.median([sum(r.values()) for r in seconds[p]]) for p in "ab"}
    denoise = {p: np.median(stages[p]["denoise"]) for p in "ab"}
    flops = {"a": video_a.trace.flops_computed_and_full()[0], "b": video_b.trace.flops_computed_and_full()[0]}
    work, speed = flops["b"] / flops["a"], float(denoise["a"] / denoise["b"])
    same = video_a.frames.shape == video_b.frames.shape
    similarity = distance(video_a.frames, video_b.frames) if same else {}
    adherence = {
        p: score(v.frames, b.prompt) if defaults.toy_world else {} for p, v in (("a", video_a), ("b", video_b))
    }
    pairs = [x["denoise"] / y["denoise"] for x, y in zip(seconds["a"], seconds["b"])]
    return {
        **b.model_dump(),
        "steps_a": a.steps,
        "guidance_a": a.guidance,
        **environment(pipe),
        **stages,
        "speedup_denoise": speed,
        "speedup_range": [min(pairs), max(pairs)],
        "noise_a": max(stages["a"]["denoise"]) / min(stages["a"]["denoise"]),
        "speedup_total": float(total["a"] / total["b"]),
        "work_ratio": work,
        "efficiency": speed * work,
        **{k: similarity.get(k) for k in ("psnr", "ssim", "ssim_worst", "bit_equal", "ssim_frames")},
        "adherence_a": adherence["a"].get("mean"),
        "adherence_b": adherence["b"].get("mean"),
        "attributes": {p: {k: v for k, v in marks.items() if k != "mean"} for p, marks in adherence.items()},
        "trace": video_b.trace.to_json(),
    }
