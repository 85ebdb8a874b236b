"""The quality metrics. `run.json`, bench results, tables, documents and the page's cards are made from `METRICS`.

To add a metric, write a function of a `Pair` and add one `Metric` to the list at the end. Nothing else has to change.
If it applies to some models only, set `extra=True`; a model then asks for it in its `accel.json`: "metrics": ["NAME"].
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from typing import TYPE_CHECKING

import numpy as np

from ..errors import AccelError

if TYPE_CHECKING:  # the page reads this list before it imports torch
    from ..runtime.generate import Video
    from ..runtime.models import ModelDefaults

MIN_JUDGED_SIZE = 48  # pixels: smaller frames do not hold the textures of the toy world
Value = float | dict[str, float] | None  # None: not defined for this pair; a dict holds parts and their "mean"


@dataclass(frozen=True)
class Pair:
    """What a metric sees: a video, the baseline from the same noise, and the prompt of both."""

    baseline: Video
    video: Video
    prompt: str

    @cached_property
    def same_shape(self) -> bool:
        """Whether the frames can be compared pixel by pixel."""
        return self.baseline.frames.shape == self.video.frames.shape

    @cached_property
    def bit_equal(self) -> bool:
        """Whether all pixels are equal."""
        return bool(np.array_equal(self.baseline.frames, self.video.frames))

    @cached_property
    def ssim_frames(self) -> list[float]:
        """SSIM of each frame."""
        return ssim_frames(self.baseline.frames, self.video.frames)


@dataclass(frozen=True)
class Metric:
    """One metric: how it is computed, summarised and shown."""

    name: str  # its key in run.json, results.jsonl and results.json
    title: str  # its name in tables
    about: str  # what it says, in one line
    measure: Callable[[Pair], Value]
    higher_is_better: bool | None  # None: the nearer to 1, the better
    digits: int = 3  # after the decimal point in tables
    text: str = "{:.3f}"  # format of one value on the page
    undefined: str = "-"  # shown for None
    of_one_video: bool = False  # needs no baseline: it is measured on both videos, and their difference is reported
    parts: str = ""  # key of the single values where `measure` returns a dict
    worst_only: bool = False  # a setting is summarised by its worst value, not by the mean
    extra: bool = False  # measured only for models that name it in accel.json
    optional: bool = False  # None also where the program that measures it is missing
    package: str = ""  # measured only where this one is installed
    shown_in: frozenset[str] = frozenset()  # "brief", "report", "details", "pairs" (tables) and "page"

    def format(self, value: Value) -> str:
        """One value as the page shows it."""
        value = mean_of(value)
        return self.undefined if value is None else self.text.format(value)


def mean_of(value: Value) -> float | None:
    """The value of a metric, or the mean of its parts."""
    return value.get("mean") if isinstance(value, dict) else value


def metrics_of(defaults: ModelDefaults) -> list[Metric]:
    """The metrics measured for a model here. Raises AccelError if its accel.json names one that does not exist."""
    if unknown := [name for name in defaults.metrics if name not in METRICS]:
        raise AccelError(f"accel.json: unknown metric {unknown[0]!r}; there are {', '.join(METRICS)}")
    wanted = [metric for metric in METRICS.values() if not metric.extra or metric.name in defaults.metrics]
    return [metric for metric in wanted if not metric.package or find_spec(metric.package)]


def measure(pair: Pair, metrics: Iterable[Metric]) -> dict[str, Value]:
    """{name: value} of a video."""
    return {m.name: m.measure(pair) if m.of_one_video or pair.same_shape else None for m in metrics}


def report_metrics(pair: Pair, metrics: Iterable[Metric]) -> dict:
    """The metrics of a pair as `run.json` holds them; None for those that are not measured for its model.

    A metric of one video has the keys NAME_a (baseline) and NAME_b, and its parts another key.
    """
    metrics, report = list(metrics), {}
    videos = {"a": Pair(pair.baseline, pair.baseline, pair.prompt), "b": pair}
    values = {side: measure(videos[side], [m for m in metrics if m.of_one_video or side == "b"]) for side in videos}
    for m in METRICS.values():
        if not m.of_one_video:
            report[m.name] = values["b"].get(m.name)
            continue
        report |= {f"{m.name}_{side}": mean_of(values[side].get(m.name)) for side in videos}
        if m.parts:
            parts = {side: values[side].get(m.name) or {} for side in videos}
            report[m.parts] = {side: {k: v for k, v in parts[side].items() if k != "mean"} for side in videos}
    return report


def metric_texts(report: dict) -> list[tuple[str, str]]:
    """(value, what it says) of each metric of a `run.json` that the page shows."""
    texts = []
    for m in METRICS.values():
        key = f"{m.name}_b" if m.of_one_video else m.name
        differs = m.undefined == "bit-equal" and not report.get("bit_equal")  # in size
        unmeasured = report.get(key) is None and (m.extra or m.optional or m.package or differs)
        if "page" not in m.shown_in or key not in report or unmeasured:
            continue
        about = f"{m.about}, baseline {m.format(report[f'{m.name}_a'])}" if m.of_one_video else m.about
        wrong = [part for part, value in report.get(m.parts, {}).get("b", {}).items() if not value]
        texts.append((m.format(report[key]), about + (f"; not seen: {', '.join(wrong)}" if wrong else "")))
    return texts


def ssim_frames(a: np.ndarray, b: np.ndarray) -> list[float]:
    """SSIM of each pair of uint8 frames (f, h, w, c)."""
    from skimage.metrics import structural_similarity

    return [float(structural_similarity(x, y, channel_axis=-1, data_range=255)) for x, y in zip(a, b, strict=True)]


def psnr(a: np.ndarray, b: np.ndarray) -> float | None:
    """PSNR in dB of uint8 frames (f, h, w, c); None if they are equal. Raises AccelError for different shapes."""
    from skimage.metrics import peak_signal_noise_ratio

    if a.shape != b.shape:
        raise AccelError(f"videos of shapes {a.shape} and {b.shape} cannot be compared")
    return None if np.array_equal(a, b) else float(peak_signal_noise_ratio(a, b, data_range=255))


def _ratio(value: float, base: float) -> float | None:
    return float(value / base) if base else None


def by_ffmpeg(name: str) -> Callable[[Pair], float | None]:
    """A metric of `ffmpeg_metrics`, to the baseline; None where ffmpeg cannot measure it."""

    def measured(pair: Pair) -> float | None:
        from . import ffmpeg_metrics

        return getattr(ffmpeg_metrics, name)(pair.baseline.frames, pair.video.frames)

    return measured


def cvvdp(pair: Pair) -> float:
    """ColorVideoVDP to the baseline, in just-objectionable differences."""
    from .learned_metrics import cvvdp

    return cvvdp(pair.baseline.frames, pair.video.frames, pair.video.fps)


def lpips(pair: Pair) -> float:
    """LPIPS to the baseline, mean of the frames."""
    from .learned_metrics import lpips

    return lpips(pair.baseline.frames, pair.video.frames)


def latent_nmse(pair: Pair) -> float | None:
    """Squared error of the final latents (1, c, f, h, w) divided by the mean square of the baseline's."""
    x, y = pair.baseline.latents.float(), pair.video.latents.float()
    return _ratio((x - y).square().mean(), x.square().mean())


def _ratio_of_frames(value: Callable[[np.ndarray], float]) -> Callable[[Pair], float | None]:
    """The value of frames (f, h, w, c), divided by the baseline's."""
    return lambda pair: _ratio(*(value(video.frames.astype(np.float32)) for video in (pair.video, pair.baseline)))


def _change(frames: np.ndarray, order: int) -> float:
    """Mean absolute difference over time of frames (f, h, w, c), of some order; 0 for too few frames."""
    return np.abs(np.diff(frames, order, axis=0)).mean() if len(frames) > order else 0.0


def _high_frequency_ratio(pair: Pair, axis: int) -> float | None:
    from ..ops.spectrum import high_energy

    base, value = (high_energy(video.latents.float())[axis] for video in (pair.baseline, pair.video))
    return _ratio(value, base)


def adherence(pair: Pair) -> dict[str, float] | None:
    """1 or 0 for each attribute of the prompt that the toy world's judge reads back from the video, and their mean.

    None for a video that is too small for the judge, or not square.
    """
    from ..world.judge import score

    return score(pair.video.frames, pair.prompt) if _is_judged(pair.video.frames) else None


def _is_judged(frames: np.ndarray) -> bool:
    height, width = frames.shape[1:3]
    return height == width >= MIN_JUDGED_SIZE


def texture(pair: Pair) -> float | None:
    """Distance of the background to the living texture that the prompt names.

    None if it names none, if none is seen, or for a video that is not square, as the world's scenes are.
    """
    from ..world.scene import LIVING, read_caption
    from ..world.texture_stats import texture_distance

    pattern, (height, width) = read_caption(pair.prompt).get("pattern"), pair.video.frames.shape[1:3]
    return texture_distance(pair.video.frames, pattern) if pattern in LIVING and height == width else None


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric(
            "ssim", "SSIM", "SSIM to the baseline, mean of the frames", lambda pair: float(np.mean(pair.ssim_frames)),
            higher_is_better=True, digits=4, text="{:.4f}",
            shown_in=frozenset({"brief", "report", "pairs", "page"}),
        ),
        Metric(
            "ssim_worst", "worst", "SSIM of the worst frame", lambda pair: min(pair.ssim_frames),
            higher_is_better=True, worst_only=True, shown_in=frozenset({"report", "page"}),
        ),
        Metric(
            "psnr", "PSNR dB", "PSNR to the baseline", lambda pair: psnr(pair.baseline.frames, pair.video.frames),
            higher_is_better=True, digits=1, text="{:.1f} dB", undefined="bit-equal",
            shown_in=frozenset({"report", "page"}),
        ),
        Metric(
            "vmaf", "VMAF", "VMAF to the baseline, of 100", by_ffmpeg("vmaf"), higher_is_better=True, digits=1,
            text="{:.1f}", optional=True, shown_in=frozenset({"report", "page"}),
        ),
        Metric(
            "xpsnr", "XPSNR dB", "PSNR to the baseline, weighted by what the eye sees", by_ffmpeg("xpsnr"),
            higher_is_better=True, digits=1, text="{:.1f} dB", shown_in=frozenset({"details"}),
        ),
        Metric(
            "cvvdp", "ColorVideoVDP", "ColorVideoVDP to the baseline: 10 where no difference is seen", cvvdp,
            higher_is_better=True, digits=2, text="{:.2f}", package="pycvvdp",
            shown_in=frozenset({"report", "page"}),
        ),
        Metric(
            "lpips", "LPIPS", "LPIPS to the baseline: 0 where the two look the same", lpips, higher_is_better=False,
            digits=4, text="{:.4f}", package="lpips", shown_in=frozenset({"report", "page"}),
        ),
        Metric(
            "latent_nmse", "latent error", "squared error of the final latents, relative to the baseline's mean square",
            latent_nmse, higher_is_better=False, shown_in=frozenset({"details", "pairs"}),
        ),
        Metric(
            "motion_ratio", "motion ratio", "mean change from frame to frame, relative to the baseline's",
            _ratio_of_frames(lambda frames: _change(frames, 1)), higher_is_better=None,
            shown_in=frozenset({"details"}),
        ),
        Metric(
            "flicker", "flicker", "mean change of the change from frame to frame, relative to the baseline's",
            _ratio_of_frames(lambda frames: _change(frames, 2)), higher_is_better=None,
            shown_in=frozenset({"details"}),
        ),
        Metric(
            "saturation_ratio", "saturation", "mean span of a pixel's colours, relative to the baseline's",
            _ratio_of_frames(lambda frames: np.ptp(frames, axis=-1).mean()), higher_is_better=None,
            shown_in=frozenset({"details"}),
        ),
        Metric(
            "spatial_hf", "spatial detail", "latents' energy in high spatial frequencies, relative to the baseline's",
            lambda pair: _high_frequency_ratio(pair, 0), higher_is_better=None, shown_in=frozenset({"details"}),
        ),
        Metric(
            "temporal_hf", "temporal detail",
            "latents' energy in high temporal frequencies, relative to the baseline's",
            lambda pair: _high_frequency_ratio(pair, 1), higher_is_better=None, shown_in=frozenset({"details"}),
        ),
        Metric(
            "adherence", "adherence", "of the prompt read back", adherence, higher_is_better=True, text="{:.0%}",
            of_one_video=True, parts="attributes", extra=True,
            shown_in=frozenset({"brief", "report", "details", "pairs", "page"}),
        ),
        Metric(
            "texture", "texture", "distance of the background to the named texture, about 1 for a true one", texture,
            higher_is_better=False, digits=2, text="{:.2f}", of_one_video=True, extra=True,
            shown_in=frozenset({"report", "page"}),
        ),
    )
}  # fmt: skip
