"""Fills the marked parts of README.md and of the model card from the measurements: `python -m accel.evaluation.docs`.

Between `<!-- name -->` and `<!-- /name -->` stands what the table of that name says now; nobody types a figure.
"""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path

from ..methods import METHODS
from ..runtime.paths import ROOT
from .bench import ABLATIONS, MEANS, PAIRS
from .metrics import RATIOS
from .report import BRIEF, COLUMNS, paired, table
from .stats import format_interval

RESULTS = ROOT / "docs" / "results"
NOT_YET = "Not measured yet.\n"
OVERVIEW = (  # suite, row, and what it is called where all are together
    ("fastercache", "fastercache", "`fastercache`"),
    ("fastercache", "baseline, 30 steps", "30 plain steps"),
    ("asymrnr", "asymrnr", "`asymrnr`"),
    ("asymrnr", "baseline, 38 steps", "38 plain steps"),
    ("balanced", "fastercache + asymrnr", "`balanced`"),
    ("balanced", "baseline, 24 steps", "24 plain steps"),
    ("meanflow", "meanflow, 20 steps", "`meanflow`, 20 steps"),
    ("meanflow", "baseline, 10 steps", "10 plain steps"),
    ("disca", "disca", "`disca`"),
    ("disca", "meanflow, 10 steps", "`meanflow`, 10 steps"),
    ("disca", "Euler, 5 steps", "5 plain steps by Euler's rule"),
    ("gpd", "gpd, 6 steps", "`gpd`"),
    ("gpd", "baseline, 3 steps (equal NFE)", "3 plain steps"),
    ("disca", "turbo", "`turbo`"),
    ("disca", "meanflow, 6 steps", "`meanflow`, 6 steps"),
)
MEASURED = ("fastercache", "asymrnr", "asymrnr-curve", "balanced", "gpd", *ABLATIONS, *MEANS, "disca")
CARD = ROOT / "models" / "tiny-wan" / "README.md"


def parameters() -> str:
    """One row per knob of each method."""
    rows = ["| knob | default | allowed | what it costs |", "|---|---|---|---|"]
    for name, method in METHODS.items():
        for knob, schema in method.model_json_schema()["properties"].items():
            rows.append(f"| `{name}.{knob}` | {schema['default']} | {_values(schema)} | {schema['description']} |")
    return "\n".join(rows) + "\n"


def _values(schema: dict) -> str:
    """What a knob may be set to."""
    if "maximum" in schema:
        return f"{schema['minimum']} to {schema['maximum']}"
    if "enum" in schema:
        return ", ".join(map(str, schema["enum"]))
    return {"boolean": "true, false", "string": "a text", "object": "a table"}[schema["type"]]


def measured(name: str) -> dict | None:
    """What a suite came to, if it was measured."""
    file = RESULTS / name / "results.json"
    return json.loads(file.read_text()) if file.is_file() else None


def overview() -> str:
    """The presets beside plain rivals, each from its own suite."""
    columns = ("speed-up", "SSIM", "adherence", "- baseline")
    lines = [f"| preset | {' | '.join(columns)} | n |", f"|---|{'---|' * len(columns)}---|"]
    for name, row, title in OVERVIEW:
        found = measured(name)
        if not found or row not in found["rows"]:
            lines.append(f"| {title} | {NOT_YET.strip()} |{' |' * len(columns)}")
            continue
        cells = (COLUMNS[column](found["rows"][row]) for column in columns)
        lines.append(f"| {title} | {' | '.join(cells)} | {found['n']} |")
    return "\n".join(lines) + "\n"


def suite(name: str) -> str:
    """The short table of a suite that was measured, or a word that it was not."""
    found = measured(name)
    return table(found, BRIEF) if found else NOT_YET


def details(name: str) -> str:
    """The ratios of each setting of a suite to its first one, and the attributes that are read back."""
    found = measured(name)
    if not found:
        return NOT_YET
    rows = found["rows"]
    read = list(next(iter(rows.values()))["attributes"])
    heads = [*(f"{n} ratio" for n in RATIOS), *read]
    lines = [f"| setting | {' | '.join(heads)} |", f"|---|{'---|' * len(heads)}"]
    for setting, row in rows.items():
        cells = [*(format_interval(row[n]) for n in RATIOS), *(f"{row['attributes'][n][0]:.2f}" for n in read)]
        lines.append(f"| {setting} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n\n" + "; ".join(f"{n}: {what}" for n, what in RATIOS.items()) + "\n"


def pairs(name: str) -> str:
    """Rows of a suite held against each other, prompt by prompt."""
    found = measured(name)
    return paired(found) if found else NOT_YET


def students() -> str:
    """How each student was trained and what it came to on the prompts of the stop rule."""
    lines = [
        "| student | horizon | iteration | minutes | error of a jump | error of the video |",
        "|---|---|---|---|---|---|",
    ]
    made = [json.loads(file.read_text()) for file in CARD.parent.glob("gpd-N*/gpd.json")]
    for facts in sorted(made, key=lambda f: -f["steps"]):
        held = facts["validation"]
        cells = (facts["steps"], facts["horizon"], _kept(held), f"{held['seconds'] / 60:.0f}",
                 f"{held['jump']:.3f}", f"{held['end']:.3f}")  # fmt: skip
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def _kept(held: dict) -> str:
    """Whose weights a stage left, of how many: where its looks saw the smallest error, or else the last one's."""
    seen = held.get("validation_curve", {})
    best = [step for step, error in seen.items() if error == held["velocity_mse"]]
    return f"{best[0] if best else held['step']} of {held['steps']}"


def disca() -> str:
    """How the MeanFlow student and the predictors were trained, stage by stage, and what each stage came to."""
    record = json.loads((CARD.parent / "training.json").read_text())
    lines = [
        "| part | stage | iteration | minutes | error looked at | error of the video |",
        "|---|---|---|---|---|---|",
    ]
    forms = {f"predictor, {f.parent.name}": json.loads(f.read_text()) for f in CARD.parent.glob("predictor/*/*.json")}
    runs = {"meanflow": record.get("meanflow", {}).get("stages", {})}
    runs |= {name: facts["stages"] for name, facts in sorted(forms.items(), reverse=True)}
    for part, stages in runs.items():
        for name, held in stages.items():
            spent = f"{_kept(held)} | {held['seconds'] / 60:.0f}"
            lines.append(f"| {part} | {name} | {spent} | {held['jump']:.3f} | {held['end']:.3f} |")
    return "\n".join(lines) + "\n"


def attributes() -> str:
    """How often each attribute of the prompt is read back from the plain model's videos."""
    summary = measured("base")
    if not summary:
        return NOT_YET
    row = summary["rows"]["baseline"]
    marks = {**row["attributes"], "mean": row["adherence"]}
    lines = [f"| {a} | {v[0]:.3f} | {v[1]:.3f} to {v[2]:.3f} |" for a, v in marks.items()]
    where = f"{summary['n']} held-out prompts, {summary['device']}, {summary['threads']} threads, {summary['dtype']}"
    time = f"{row['seconds']:.1f} s of denoising, {row['decode']:.2f} s of decoding (medians)"
    return f"{where}; {time}\n\n| attribute | read back | 95 % interval |\n|---|---|---|\n" + "\n".join(lines) + "\n"


def training() -> str:
    """Device, steps, time and result of each training run, in their order."""
    file = CARD.parent / "training.json"
    record = json.loads(file.read_text()) if file.is_file() else {}
    lines = ["| part | device | steps | minutes | learning rates (AdamW, Muon) | result |", "|---|---|---|---|---|---|"]
    for part, newest in record.items():
        for run in _runs(newest):
            result = _reconstruction(run) if "psnr" in run else "see below" if run is newest else "the next one's start"
            cells = (
                part,
                run["device"],
                f"{run['step']} of {run['steps']}",
                f"{run['seconds'] / 60:.0f}",
                f"{run['recipe']['lr']}, {run['recipe']['matrix_lr']}",
                result,
            )
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def _runs(record: dict) -> list[dict]:
    """A run and those whose weights it began with, the first one first."""
    return [*(_runs(record["parent_run"]) if "parent_run" in record else []), record]


def _reconstruction(r: dict) -> str:
    """How true the autoencoder is: its error, and whether the judge still reads the scene."""
    read = ", ".join(f"{a} {share:.0%}" for a, share in r["read"].items())
    return f"PSNR {r['psnr']} ± {r['interval']} dB on {r['n']} held-out clips; read back from these: {read}"


def layout() -> str:
    """Speed and memory of the methods on random weights in a real layout."""
    found = measured("wan-1.3b")
    if not found:
        return NOT_YET
    size = "{width}x{height}, {frames} frames, {steps} steps, guidance {guidance:g}".format(**found)
    lines = [
        f"{found['device']}, {found['dtype']}, {size}; n = {found['n']}",
        "",
        "| setting | denoise s | speed-up | work | efficiency | most memory | more than plain |",
        "|---|---|---|---|---|---|---|",
    ]
    plain = next(iter(found["rows"].values()))["peak_memory_bytes"]
    for name, row in found["rows"].items():
        figures = " | ".join(f"{row[key]:.2f}" for key in ("speedup", "work", "efficiency"))
        memory = " | ".join(
            f"{taken / 1e9:.1f} GB" for taken in (row["peak_memory_bytes"], row["peak_memory_bytes"] - plain)
        )
        lines.append(f"| {name} | {row['seconds']:.1f} | {figures} | {memory} |")
    return "\n".join(lines) + "\n"


PARTS = {
    "overview": overview,
    "layout": layout,
    "knobs": parameters,
    "attributes": attributes,
    "training": training,
    "students": students,
    "disca-training": disca,
}
PARTS |= {name: partial(suite, name) for name in MEASURED}
PARTS |= {f"{name}-details": partial(details, name) for name in ("gpd", *ABLATIONS, *MEANS, "disca")}
PARTS |= {f"{name}-pairs": partial(pairs, name) for name in PAIRS}


def fill(text: str) -> str:
    """The text with every marked part as it should be now."""
    for name, make in PARTS.items():
        pattern = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
        if re.search(pattern, text, re.S):
            made = make()
            text = re.sub(pattern, lambda m, made=made: m[1] + made + m[2], text, flags=re.S)
    return text


def pages() -> list[Path]:
    """The pages that hold marked parts."""
    return [ROOT / "README.md", CARD]


def main() -> None:
    """Rewrite the marked parts in place."""
    for page in pages():
        page.write_text(fill(page.read_text()))


if __name__ == "__main__":
    main()
