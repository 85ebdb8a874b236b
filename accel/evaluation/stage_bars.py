"""How long each stage of the two runs took, as two bars of one scale."""

from __future__ import annotations

from statistics import median
from typing import NamedTuple

from markupsafe import Markup

from .markup import render
from .patterns import BLUE, FALLING, GREEN, GREY, LEVEL, ORANGE, PINK, RISING, UPRIGHT, Pattern

STAGES = {
    "load": Pattern(GREY, "load (a student's weights)", (RISING, FALLING)),
    "text": Pattern(ORANGE, "text", (RISING,)),
    "denoise": Pattern(BLUE, "denoise"),
    "decode": Pattern(GREEN, "decode", (LEVEL,)),
    "encode": Pattern(PINK, "encode", (UPRIGHT,)),
}
LEAST_WIDTH = 4  # thousandths of the scale: a stage that took no time is still seen


class Segment(NamedTuple):
    """A stage in a bar: its place in thousandths of the scale, and its hint."""

    stage: str
    x: float
    width: float
    hint: str


class StageBar(NamedTuple):
    """The stages of one run, one after the other."""

    title: str
    segments: list[Segment]
    total: float
    words: str


def stage_bars(report: dict, titles: tuple[str, str] = ("reference", "candidate")) -> Markup:
    """HTML with a bar for each run of a report, its stages stacked; the slower run fills the width."""
    seconds = {side: {stage: median(times) for stage, times in report[side].items()} for side in "ab"}
    scale = max(sum(stages.values()) for stages in seconds.values()) or 1
    bars = [_bar(title, seconds[side], scale) for side, title in zip("ab", titles)]
    used = {stage for stages in seconds.values() for stage in stages}
    legend = [pattern for stage, pattern in STAGES.items() if stage in used]
    return render("stage_bars", bars=bars, legend=legend, patterns=STAGES)


def _bar(title: str, seconds: dict[str, float], scale: float) -> StageBar:
    x, segments = 0.0, []
    for stage, time in seconds.items():
        width = max(1000 * time / scale, LEAST_WIDTH)
        segments.append(Segment(stage, round(x, 1), round(width, 1), f"{title}, {stage}: {time:.2f} s"))
        x += width
    words = " · ".join(f"{stage} {time:.2f} s" for stage, time in seconds.items())
    return StageBar(title, segments, sum(seconds.values()), words)
