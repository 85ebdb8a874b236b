"""Runs a sweep into a folder: results.json, pareto.png, a folder for each setting. A second call resumes the first."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from tqdm import tqdm

from ..errors import AccelError
from ..files import read_json, write_json
from ..runtime.generate import Video, environment, generate, preflight, warm_up
from ..runtime.models import ModelDefaults, method_weights, weights
from ..runtime.presets import build_methods
from ..runtime.run import Run
from ..runtime.video import write_mp4
from .compare import compare
from .front import Point, plot
from .metrics import METRICS
from .pareto_front import pareto_front
from .report import markdown
from .result_log import config_hash, read_results
from .sweep import Cell, value_text
from .sweep_rows import row_of

CellRun = tuple[Cell, Run, Run]  # a cell, its reference and its own run


def run_sweep(cells: Sequence[CellRun], pipe, defaults: ModelDefaults, out: Path) -> dict:
    """Measure each cell against its reference, which is generated once, and write everything below `out`.

    Returns the content of results.json. Cells that were finished by an earlier call are read, not measured again.
    Raises AccelError if `out` holds results of another reference, model or machine, or if a cell cannot run.
    """
    model = cells[0][1].model
    first = [a.model_dump(exclude={"seed"}) for _, a, _ in cells[:1]]
    key = config_hash(first, weights(model), environment(pipe), *_files(cells[0][1]))
    _check_out(out, key)
    for run in (*{a.seed: a for _, a, _ in cells}.values(), *(b for *_, b in cells)):  # before anything is generated
        preflight(run, pipe)
    out.mkdir(parents=True, exist_ok=True)
    rows, reference = {}, ReferenceVideo(pipe, defaults, out)
    todo = [cell_run for cell_run in cells if not _finished(out, *cell_run)]
    references = {a.seed: a for _, a, _ in todo}.values()
    with tqdm(total=sum(run.steps for run in (*references, *(b for _, _, b in todo))), desc="sweep") as bar:
        for cell, a, b in cells:
            report = _finished(out, cell, a, b)
            if report is None:
                report = _measure(
                    out / folder_name(cell), a, b, pipe, defaults, reference.of(a, bar.update), bar.update
                )
            rows[folder_name(cell)] = {**row_of(cell, report), "folder": folder_name(cell)}
            document = {"key": key, "reference": a.model_dump(), **environment(pipe), "rows": list(rows.values())}
            write_json(out / "results.json", document)
    document["front"] = front_of(document["rows"])
    series: dict[str, list[Point]] = {"settings": [], "plain steps": []}
    for row in document["rows"]:
        if row["ssim"] is not None:
            series["plain steps" if row["plain"] else "settings"].append((row["speedup"], row["ssim"], row["label"]))
    plot(series, out / "pareto.png", "measured speed-up of the denoising")
    return document


class ReferenceVideo:
    """The reference of a sweep: generated when a cell first needs it, and again only for another seed."""

    def __init__(self, pipe, defaults: ModelDefaults, out: Path):
        self.pipe, self.defaults, self.out = pipe, defaults, out
        self.run: Run | None = None
        self.video: Video | None = None

    def of(self, run: Run, on_step: Callable[[], None]) -> Video:
        """The video of a reference run, with its file a-SEED.mp4."""
        if self.run != run:
            if self.video is None:
                warm_up(run, self.pipe, self.defaults)
            video = generate(run, self.pipe, self.defaults, lambda *_: on_step())
            file = self.out / f"a-{run.seed}.mp4"
            video.seconds["encode"] = write_mp4(file, video.frames, self.defaults.fps, run.model_dump())
            self.run, self.video = run, video
        return self.video


def folder_name(cell: Cell) -> str:
    """The name of a cell's folder, as "attention_interval=3,steps=20"."""
    words = [f"{name}={value_text(value)}" for name, value in cell.values.items()]
    return re.sub(r"[^\w.,=+-]+", "_", ",".join(["plain"] * cell.plain + words))


def _measure(folder: Path, a: Run, b: Run, pipe, defaults, reference: Video, on_step: Callable[[], None]) -> dict:
    """The report of a cell; its folder appears complete."""
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()

    def write(_: str, video: Video) -> None:
        video.seconds["encode"] = write_mp4(part / "b.mp4", video.frames, defaults.fps, b.model_dump())

    count = lambda pane, *_: on_step() if pane == "b" else None
    report = compare(a, b, pipe, defaults, on_step=count, on_video=write, baseline=reference).report
    report["method_files"] = _files(b)
    write_json(part / "run.json", report)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(part, folder)
    return report


def _finished(out: Path, cell: Cell, a: Run, b: Run) -> dict | None:
    """The report of a cell if it was measured before with the same run and reference."""
    file = out / folder_name(cell) / "run.json"
    if not file.is_file():
        return None
    report = read_json(file)
    same = all(report.get(name) == value for name, value in b.model_dump().items())
    same = same and report.get("method_files", []) == _files(b)
    return report if same and (report["steps_a"], report["guidance_a"]) == (a.steps, a.guidance) else None


def _files(run: Run) -> list[str]:
    return method_weights(build_methods(run.methods), run.model)


def _check_out(out: Path, key: str) -> None:
    file = out / "results.json"
    if file.is_file() and read_results(file, "sweep").get("key") != key:
        raise AccelError(f"{out} holds a sweep of another reference, model or machine: give another --out")


def front_of(rows: Sequence[dict]) -> list[str]:
    """The labels of the rows on the front of speed-up and SSIM."""
    points = [(row["speedup"], row["ssim"]) for row in rows if row["ssim"] is not None]
    labels = [row["label"] for row in rows if row["ssim"] is not None]
    return [labels[i] for i in pareto_front(points)]


def sweep_table(rows: Sequence[dict]) -> str:
    """The rows as a Markdown table; settings on the front of speed-up and SSIM have a star."""
    shown = [m for m in METRICS.values() if "brief" in m.shown_in and any(_value(row, m) is not None for row in rows)]
    front = front_of(rows)
    lines = [
        [f"{row['label']}{' *' * (row['label'] in front)}", f"{row['seconds']:.2f}", f"{row['speedup']:.2f}",
         f"{row['work']:.2f}", *(m.format(_value(row, m)) for m in shown)]
        for row in rows
    ]  # fmt: skip
    return markdown(["setting", "denoise s", "speed-up", "work", *(m.title for m in shown)], lines)


def _value(row: dict, metric) -> float | None:
    return row.get(f"{metric.name}_b" if metric.of_one_video else metric.name)
