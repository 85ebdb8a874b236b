"""Fills the generated tables of README.md, docs/ and the model card: `python -m accel docs`.

A table stands between `<!-- NAME -->` and `<!-- /NAME -->`; `PARTS` lists the names. For each suite there are SUITE,
SUITE-details and SUITE-pairs.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

from ..errors import AccelError
from ..families import FAMILIES, Family
from ..methods import METHODS
from ..runtime.models import TINY
from ..runtime.paths import ROOT
from .front import front_overview, front_table
from .layouts import LAYOUTS
from .memory import SETTINGS, forecast
from .metrics import METRICS
from .report import SPEED, cell, columns, machine, markdown, pairs_table, table
from .suites import FRONT, OVERVIEW, RESULTS, SUITES, baseline_at_matched_time, preset_rows, results

OURS = [name for name, method in METHODS.items() if not method.peer]
CARD = ROOT / TINY / "README.md"
NOT_YET = "Not measured yet.\n"
FITS = {"fittedsolver": "no, but a fit"}  # methods without trained weights that need numbers of a model
MARKED = re.compile(r"(<!-- ([\w.-]+) -->\n)(.*?)(<!-- /\2 -->)", re.S)


def overview() -> str:
    """One row for each preset: its figures, and the best baseline at matched time."""
    head = ["preset", "speed-up", "SSIM", "adherence", "delta adherence", "SSIM of the baseline at matched time"]
    rows, found = [], results(FRONT)
    measured = preset_rows(found)
    for preset in OVERVIEW:
        if not (row := measured.get(preset)):
            rows.append([f"`{preset}`", NOT_YET.strip(), *[""] * 4])
            continue
        adherence = [cell(METRICS["adherence"], row[key]) for key in ("adherence", "adherence_delta")]
        figures = [SPEED["speed-up"](row), cell(METRICS["ssim"], row["ssim"]), *adherence]
        rows.append([f"`{preset}`", *figures, baseline_at_matched_time(found, row)])
    return markdown(head, rows)


def methods(peers: bool = False) -> str:
    """One row for each of our methods with a link to its page, for the README, or for each peer; from its class."""
    rows = []
    for name, method in METHODS.items():
        if method.peer != peers:
            continue
        arxiv = method.paper.removeprefix("arXiv ")
        paper = f"[{method.paper}](https://arxiv.org/abs/{arxiv})" if arxiv else "-" if method.peer else "ours"
        about = inspect.getdoc(method).split("\n\n")[0].replace("\n", " ")
        title = method.title if method.peer else f"[{method.title}](docs/methods/{name}.md)"
        rows.append([f"`{name}`", title, paper, about, "yes" if needs_training(name) else FITS.get(name, "no")])
    return markdown(["name", "method", "paper", "what it does", "needs training"], rows)


def needs_training(name: str) -> bool:
    """Whether a method, at its defaults, reads weights that are trained for one model."""
    return METHODS[name]().weights_dir(ROOT / TINY) is not None


def support_cells() -> dict[tuple[Family, str], str]:
    """For each model family and method of ours: whether it runs, or needs a training first."""
    return {(family, name): family.remarks.get(name) or _state(family, name) for family in FAMILIES for name in OURS}


def support() -> str:
    """The cells as a table, in which the shipped model is the first row."""
    rows, cells = [["tiny-wan (shipped)", *["yes"] * len(OURS)]], support_cells()
    for family in FAMILIES:
        pipelines = ", ".join(f"`{p}`" if p.endswith("Pipeline") else f"`{p}*Pipeline`" for p in family.pipelines)
        rows.append([pipelines, *(cells[family, name] for name in OURS)])
    return markdown(["model", *(f"`{name}`" for name in OURS)], rows)


def _state(family: Family, name: str) -> str:
    if name in FITS:
        return "after a fit, from text"
    if not needs_training(name):
        return "yes"
    return "yes" if name == "disca" else "after training" if family.trains_students else "no"


@cache  # every model is built, though without its weights
def memory() -> str:
    """Forecast of what methods hold on real models."""
    rows = []
    for name, layout in LAYOUTS.items():
        size, tokens, gib = forecast(layout)
        rows.append([name, size, f"{tokens:,}", *(f"{n:.1f}" for n in gib)])
    return markdown(["model", "size", "video tokens", *SETTINGS], rows)


def parameters() -> str:
    """One row for each parameter of each method."""
    rows = [
        [f"`{name}.{parameter}`", schema["default"], allowed_values(schema), schema["description"]]
        for name, method in METHODS.items()
        for parameter, schema in method.model_json_schema()["properties"].items()
    ]
    return markdown(["parameter", "default", "allowed", "what it does and costs"], rows)


def allowed_values(schema: dict) -> str:
    """The values of a parameter, from its JSON schema."""
    if "maximum" in schema:
        return f"{schema['minimum']} to {schema['maximum']}"
    if "enum" in schema:
        return ", ".join(map(str, schema["enum"]))
    return {"boolean": "true, false", "string": "a text", "object": "a mapping"}[schema["type"]]


def of_suite(suite: str, make: Callable[[dict], str]) -> str:
    """What is made of the results of a suite, if it was measured."""
    found = results(suite)
    return make(found) if found else NOT_YET


def suite_table(found: dict) -> str:
    """The "brief" table of a suite; of one with groups, the best of each."""
    return front_table(found) if "classes" in found else table(found, "brief")


def suite_details(found: dict) -> str:
    """The "details" table of a suite, and what its metrics say; the parts of adherence are shares of the videos."""
    titles = {column.title for column in columns("details", found["rows"])}
    about = "; ".join(f"{metric.title}: {metric.about}" for metric in METRICS.values() if metric.title in titles)
    return table(found, "details") + (f"\n{about}\n" if about else "")


def students() -> str:
    """How each student of GPD was trained, and its errors on the validation prompts."""
    head = ["student", "horizon", "iteration", "minutes", "velocity MSE", "error of the final latents"]
    manifests = [json.loads(file.read_text()) for file in CARD.parent.glob("gpd-N*/gpd.json")]
    rows = [
        [manifest["steps"], manifest["horizon"], *_stage(manifest["validation"])]
        for manifest in sorted(manifests, key=lambda manifest: -manifest["steps"])
    ]
    return markdown(head, rows)


def disca_training() -> str:
    """How the MeanFlow student and the predictors were trained, stage by stage."""
    record = json.loads((CARD.parent / "training.json").read_text())
    parts = {"meanflow": record["meanflow"]["stages"]} if "meanflow" in record else {}
    for file in sorted(CARD.parent.glob("predictor/*/*.json"), reverse=True):
        parts[f"predictor, {file.parent.name}"] = json.loads(file.read_text())["stages"]
    head = ["part", "stage", "iteration", "minutes", "velocity MSE", "error of the final latents"]
    rows = [[part, name, *_stage(stage)] for part, stages in parts.items() for name, stage in stages.items()]
    return markdown(head, rows)


def _stage(stage: dict) -> list[str]:
    """Iteration of the saved weights (the best of the validation curve, or the last), minutes and errors of a stage."""
    best = [step for step, error in stage.get("validation_curve", {}).items() if error == stage["velocity_mse"]]
    iteration = f"{best[0] if best else stage['step']} of {stage['steps']}"
    errors = [f"{stage[key]:.3f}" for key in ("velocity_mse", "final_latent_error")]
    return [iteration, f"{stage['seconds'] / 60:.0f}", *errors]


def training() -> str:
    """Device, steps, time and result of each training run, in their order."""
    record = json.loads((CARD.parent / "training.json").read_text())
    rows = []
    for part, newest in record.items():
        for run in _with_parents(newest):
            result = (
                _reconstruction(run) if "psnr" in run else "see below" if run is newest else "start of the next run"
            )
            steps = f"{run.get('made', run['step'])} of {run['steps']}"
            rates = f"{run['optim']['lr']}, {run['optim']['matrix_lr']}"
            rows.append([part, run["device"], steps, f"{run['seconds'] / 60:.0f}", rates, result])
    return markdown(["part", "device", "steps", "minutes", "learning rates (AdamW, Muon)", "result"], rows)


def _with_parents(run: dict) -> list[dict]:
    """The runs whose weights a run started from, the first one first, and the run itself."""
    return [*(_with_parents(run["parent_run"]) if "parent_run" in run else []), run]


def _reconstruction(run: dict) -> str:
    """Quality of the autoencoder: its PSNR, and whether the judge still reads each attribute of the scene."""
    read = ", ".join(f"{attribute} {share:.0%}" for attribute, share in run["read"].items())
    return f"PSNR {run['psnr']} ± {run['interval']} dB on {run['n']} held-out clips; read back from these: {read}"


def attributes(found: dict) -> str:
    """How often each attribute of the prompt is read back from the baseline's videos."""
    row = found["rows"]["baseline"]
    shares = {**row["attributes"], "mean": row["adherence"]}
    time = f"{row['seconds']:.1f} s of denoising, {row['decode']:.2f} s of decoding (medians)"
    rows = [[name, f"{mean:.3f}", f"{low:.3f} to {high:.3f}"] for name, (mean, low, high) in shares.items()]
    return f"{found['n']} held-out prompts, {machine(found)}; {time}\n\n" + markdown(
        ["attribute", "read back", "95 % interval"], rows
    )


def gpu() -> str:
    """Speed and memory of the methods on random weights in real layouts."""
    found = [json.loads(file.read_text()) for file in sorted(RESULTS.glob("*/results.json"))]
    return "\n".join(_gpu_table(one) for one in found if "layout" in one) or NOT_YET


def _gpu_table(found: dict) -> str:
    size = "{width}x{height}, {frames} frames, {steps} steps, guidance {guidance:g}".format(**found)
    baseline, rows = found["rows"]["baseline"]["peak_memory_bytes"], []
    for name, row in found["rows"].items():
        figures = [f"{row[key]:.2f}" if key in row else "-" for key in ("speedup", "work", "efficiency", "roofline")]
        memory = [f"{n / 2**30:.1f} GiB" for n in (row["peak_memory_bytes"], row["peak_memory_bytes"] - baseline)]
        rows.append([name, f"{row['seconds']:.1f}", *figures, *memory])
    head = [
        "setting",
        "denoise s",
        "speed-up",
        "work",
        "efficiency",
        "roofline",
        "peak memory",
        "more than the baseline",
    ]
    about = f"`{found['layout']}`: {found['device']}, {found['dtype']}, {size}; n = {found['n']}"
    return f"{about}\n\n" + markdown(head, rows)


PARTS: dict[str, Callable[[], str]] = {
    "overview": overview,
    "front-overview": partial(of_suite, FRONT, front_overview),
    "methods": methods,
    "peer-methods": partial(methods, peers=True),
    "support": support,
    "parameters": parameters,
    "gpu": gpu,
    "memory": memory,
    "attributes": partial(of_suite, "base", attributes),
    "training": training,
    "students": students,
    "disca-training": disca_training,
}
PARTS |= {suite: partial(of_suite, suite, suite_table) for suite in SUITES}
PARTS |= {f"{suite}-details": partial(of_suite, suite, suite_details) for suite in SUITES}
PARTS |= {f"{suite}-pairs": partial(of_suite, suite, pairs_table) for suite in SUITES}


def fill(text: str) -> str:
    """The text with every marked part as it should be. Raises AccelError for a name that `PARTS` lacks."""

    def part(match: re.Match) -> str:
        if match[2] not in PARTS:
            raise AccelError(f"unknown generated part {match[2]!r}; there are {', '.join(PARTS)}")
        return match[1] + PARTS[match[2]]() + match[4]

    return MARKED.sub(part, text)


def pages() -> list[Path]:
    """The documents that may hold generated parts."""
    return [ROOT / "README.md", CARD, *sorted((ROOT / "docs").rglob("*.md"))]


def write() -> list[Path]:
    """Fill all documents; returns those that changed. Raises AccelError, naming the document, for an unknown part."""
    changed = []
    for page in pages():
        text = page.read_text()
        try:
            filled = fill(text)
        except AccelError as error:
            raise AccelError(f"{page.relative_to(ROOT)}: {error}") from None
        if filled != text:
            page.write_text(filled)
            changed.append(page)
    return changed
