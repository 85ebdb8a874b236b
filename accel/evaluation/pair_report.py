"""A pair as one zip that opens without a network: both videos, one with both side by side, figures and settings."""

from __future__ import annotations

import json
import tempfile
import zipfile
from pathlib import Path

from ..errors import AccelError
from ..files import atomic_write
from ..runtime.models import TINY
from ..runtime.presets import OWN_NOISE_LEVELS, RUN_SETTINGS, build_methods
from ..runtime.repeat import command, preset_yaml, python_code, reference_of
from .markup import render
from .metrics import metric_texts
from .report import machine
from .stage_bars import stage_bars
from .step_map import step_map
from .verdict import subject, verdict

VIDEOS = ("a.mp4", "b.mp4")
NEEDED = ("model", "prompt", "seed", "methods", "a", "b", "speedup_denoise", "work_ratio", "device", "trace")


def write_report(folder: Path, out: Path) -> None:
    """Write the zip of a folder of `accel compare`: a.mp4, b.mp4, side_by_side.mp4, run.json, preset.yaml, index.html.

    Raises AccelError in one sentence if the folder holds no pair.
    """
    report = read_report(folder)
    with tempfile.TemporaryDirectory(prefix="accel-") as temporary, atomic_write(out) as part:
        joined = Path(temporary) / "side_by_side.mp4"
        write_side_by_side(folder, report, joined)
        with zipfile.ZipFile(part, "w", zipfile.ZIP_DEFLATED) as archive:
            for file in (*(folder / name for name in VIDEOS), joined):
                archive.write(file, file.name, zipfile.ZIP_STORED)  # an mp4 is compressed already
            archive.writestr("run.json", json.dumps(report, indent=1))
            archive.writestr("preset.yaml", preset_yaml(report))
            archive.writestr("index.html", report_page(report))


def read_report(folder: Path) -> dict:
    """The content of `run.json` of a folder of `accel compare`. Raises AccelError in one sentence if it is none."""
    file = folder / "run.json"
    if missing := [name for name in ("run.json", *VIDEOS) if not (folder / name).is_file()]:
        raise AccelError(f"{folder} holds no pair: {missing[0]} is missing; make one with `python -m accel compare`")
    try:
        report = json.loads(file.read_text())
    except ValueError:
        raise AccelError(f"{file} is damaged: it is not JSON") from None
    if not isinstance(report, dict) or any(key not in report for key in NEEDED):
        raise AccelError(f"{file} is not the report of a pair; make one with `python -m accel compare`")
    build_methods(report["methods"])
    return report


def report_page(report: dict) -> str:
    """The page `index.html` of a report; it refers to the videos beside it and to nothing else."""
    return render(
        "pair_report", report=report, verdict=verdict(report), figures=figures(report), labels=labels(report),
        settings=_settings(report), conditions=conditions(report),
        stages=stage_bars(report, ("reference", subject(report))), step_map=step_map(report["trace"]),
        command=command(report), code=python_code(report),
        messages=report["trace"]["summary"].get("messages", []),
    )  # fmt: skip


def figures(report: dict) -> list[tuple[str, str]]:
    """(value, what it says) of each figure of a pair."""
    return [
        (f"{report['speedup_denoise']:.2f}×", "speed of denoising"),
        (f"{report['speedup_total']:.2f}×", "speed end to end"),
        (f"{report['work_ratio']:.0%}", "of the reference's work (FLOPs)"),
        *metric_texts(report),
    ]


def conditions(report: dict) -> str:
    """Where and how often a pair was measured, and what its model is."""
    n = len(report["b"]["denoise"])
    when = f", measured {report['measured']}" if report.get("measured") else ""
    toy = report["model"] == TINY
    return f"{machine(report)}, n = {n}{when}; " + (
        "a toy model: it shows how a method works, not what it gives on a large model" if toy else report["model"]
    )


def labels(report: dict) -> tuple[str, str]:
    """What the two videos are called: their steps, and how fast the candidate was."""
    a = reference_of(report)
    reference = " + ".join(["reference", *a["methods"]])
    return f"{reference}, {a['steps']} steps", f"{subject(report)}, {report['speedup_denoise']:.2f}×"


def write_side_by_side(folder: Path, report: dict, file: Path) -> None:
    """Write both videos of a folder as one mp4, each under its label."""
    import imageio.v3 as iio
    import numpy as np

    from ..runtime.video import readable, write_mp4

    videos = []
    for name in VIDEOS:
        with readable(folder / name):
            videos.append(np.stack(list(iio.imiter(folder / name, plugin="FFMPEG"))))
            fps = round(iio.immeta(folder / name, plugin="FFMPEG")["fps"])
    count = max(map(len, videos))
    height, width = max(v.shape[1] for v in videos), max(v.shape[2] for v in videos)
    panes = [_labelled(v, text, count, height, max(width, 256)) for v, text in zip(videos, labels(report))]
    gap = np.full((count, panes[0].shape[1], 8, 3), 255, np.uint8)
    write_mp4(file, np.concatenate([panes[0], gap, panes[1]], 2), fps)


def _labelled(video, text: str, count: int, height: int, width: int):
    """A video (f, h, w, c) of `count` frames on a white canvas of a size, under a strip with its label."""
    import numpy as np
    from PIL import Image, ImageDraw, ImageFont

    strip = 32
    text = text.replace("×", "x")  # Pillow's own font lacks the sign
    canvas = Image.new("RGB", (width, height + strip), "white")
    size = next((s for s in range(16, 8, -1) if ImageFont.load_default(s).getlength(text) <= width - 8), 8)
    ImageDraw.Draw(canvas).text((4, strip / 2), text, "black", ImageFont.load_default(size), anchor="lm")
    frames = np.repeat(np.asarray(canvas)[None], count, 0)
    frames[:, strip : strip + video.shape[1], : video.shape[2]] = video[[min(i, len(video) - 1) for i in range(count)]]
    return frames


def _settings(report: dict) -> list[tuple[str, str, str]]:
    """(name, value of the reference, value of the candidate) of every setting of a pair."""
    a, b = reference_of(report), {**OWN_NOISE_LEVELS, **report}
    names = ["prompt", "seed", "model", "height", "width", "frames", *RUN_SETTINGS]
    rows = [(name, _text(a.get(name)), _text(b.get(name))) for name in names]
    of_a, of_b = (_parameters(run["methods"]) for run in (a, b))
    return rows + [(name, of_a.get(name, "-"), of_b.get(name, "-")) for name in {**of_a, **of_b}]


def _parameters(methods: dict[str, dict]) -> dict[str, str]:
    """Every parameter of every method, by a name that a table can break: "FasterCache: attention interval"."""
    return {
        f"{method.title}: {key.replace('_', ' ')}": _text(value)
        for method in build_methods(methods)
        for key, value in method.model_dump().items()
    }


def _text(value) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return "the model's own" if value in (None, "") else f"{value:g}" if isinstance(value, float) else str(value)
