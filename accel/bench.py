"""Suites of settings on held-out prompts: quality and speed of each against the plain run of the same noise.

Settings are generated in turn for each prompt, so that a slow minute of the machine hits all of them. Every result
is a line of `results.jsonl` as soon as it is there; a second start goes on where the first one stopped.
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from .ledger import Ledger, digest
from .metrics import RATIOS, distance, interval, ratios, spell
from .models import hash_of, home_of, load_pipeline, resolve, weights
from .presets import Preset, build_methods, load_preset
from .run import Video, build_run, generate, machine, warm_up
from .student import first_order
from .world.judge import score
from .world.scene import ATTRIBUTES, held_out_prompts


@dataclass(frozen=True)
class Row:
    """One setting of a suite: a preset (None: plain), the model's own steps and guidance or others, other knobs.

    `euler`: with the first-order solver in place of the model's own, on the same noise levels.
    """

    preset: str | None = None
    steps: int | None = None
    guidance: float | None = None
    euler: bool = False
    change: dict[str, dict] = field(default_factory=dict)

    def settings(self) -> dict:
        """What it sets of a run; None where the model's own value stays."""
        preset = load_preset(self.preset) if self.preset else Preset()
        methods = {name: {**preset.methods.get(name, {}), **self.change.get(name, {})} for name in
                   dict.fromkeys((*preset.methods, *self.change))}  # fmt: skip
        return {"methods": methods, "steps": self.steps or preset.steps, "guidance": self.guidance or preset.guidance}

    def trained(self, model: str) -> bool:
        """Whether the students and predictors that its methods need for a model are there."""
        folders = [method.folder(resolve(model)) for method in build_methods(self.settings()["methods"])]
        return all(folder is None or folder.is_dir() for folder in folders)


def _budgets(*shares: float) -> dict[str, Row]:
    return {f"asymrnr, budget {s}": Row("asymrnr", change={"asymrnr": {"budget": s}}) for s in shares}


def _arms(*names: str) -> dict[str, Row]:
    """GPD's rivals, as `python -m accel train gpd --arm NAME` leaves them."""
    return {name: Row("gpd", change={"gpd": {"student": f"checkpoints/{name}/gpd-N6"}}) for name in names}


ARMS = ("no-constraint", "annealed", "halving", "direct", "guidance-only")  # of training/teach.py
PLAIN = {"baseline": Row()}
# suite -> row -> setting; the others are held against the first row
SUITES: dict[str, dict[str, Row]] = {
    "base": PLAIN,
    "fastercache": PLAIN | {"fastercache": Row("fastercache"), "fewer steps: 30": Row(steps=30)},
    "asymrnr": PLAIN
    | {name: Row(name) for name in ("asymrnr", "asymrnr-official", "tome", "todo")}
    | {
        "asymrnr, judged": Row("asymrnr", change={"asymrnr": {"schedule": "judged"}}),
        "asymrnr, replace, no bias": Row("asymrnr", change={"asymrnr": {"merge": "replace", "bias": False}}),
        "fastercache + asymrnr": Row("balanced"),
        "fewer steps: 40": Row(steps=40),
        "fewer steps: 25": Row(steps=25),
    },
    "asymrnr-curve": PLAIN
    | _budgets(0.9, 0.8, 0.7, 0.6, 0.5, 0.4)
    | {f"fewer steps: {n}": Row(steps=n) for n in (47, 43, 39, 35)},
    "gpd": {"baseline, 48 steps": Row(steps=48)}
    | {f"gpd, {n} steps": Row("gpd", change={"gpd": {"steps": n}}) for n in (6, 8, 12, 16, 24)}
    | {f"fewer steps: {n}": Row(steps=n) for n in (24, 12, 6)}
    | {
        "6 steps by Euler": Row(steps=6, euler=True),
        "equal calls: 3 steps": Row(steps=3),
        "6 steps, no guidance": Row(steps=6, guidance=1.0),
    },
    "gpd-arms": {"baseline, 48 steps": Row(steps=48), "gpd": Row("gpd")} | _arms(*ARMS),
}
SUITES["meanflow"] = PLAIN | {
    name.format(n=n): Row("meanflow", change={"meanflow": {"steps": n, **of}})
    for name, of in (
        ("meanflow, {n} steps", {}),
        ("guidance distilled, {n} steps", {"student": "checkpoints/meanflow/guidance-only"}),
        ("even intervals, {n} steps", {"student": "checkpoints/even/meanflow"}),
        ("unrestricted (R = 1), {n} steps", {"student": "checkpoints/unrestricted/meanflow"}),
    )
    for n in (20, 10)
}
SUITES["meanflow"] |= {f"fewer steps: {n}": Row(steps=n) for n in (20, 10, 5)}
SUITES["disca"] = PLAIN | {
    "disca": Row("disca"),
    "disca, plain form": Row("disca", change={"disca": {"form": "plain"}}),
    "disca, squared error alone": Row("disca", change={"disca": {"predictor": "checkpoints/predictor/match-only"}}),
    **{f"{form} at the same anchors": Row("disca", change={"disca": {"form": form}})
       for form in ("reuse", "taylor-1", "taylor-2")},
    **{f"meanflow, {n} steps": Row("meanflow", change={"meanflow": {"steps": n}}) for n in (20, 12, 10, 8, 6)},
    **{f"fewer steps: {n}": Row(steps=n) for n in (6, 5)},
    "5 steps by Euler": Row(steps=5, euler=True),
    "turbo": Row("turbo"),
}  # fmt: skip
PROMPT_SEED = 2026  # of the held-out prompts that figures are reported on; nothing is tuned to them


def run_suite(suite: str, prompts: int, seeds: int, model: str, out: Path) -> dict:
    """The summary of a suite, after writing results.json, report.md and pareto.png. Raises ValueError if unknown."""
    if suite not in SUITES:
        raise ValueError(f"unknown suite {suite!r}; there are {', '.join(SUITES)}")
    rows = {name: row for name, row in SUITES[suite].items() if row.trained(model)}
    if left_out := SUITES[suite].keys() - rows.keys():
        print(f"left out, as nobody has trained them: {', '.join(sorted(left_out))}", file=sys.stderr)
    pipe = load_pipeline(model)
    home = home_of(pipe, model)
    out.mkdir(parents=True, exist_ok=True)
    ledger = Ledger(out / "results.jsonl", _key(rows, model, pipe, home))
    done = {(r["prompt"], r["seed"]) for r in ledger.lines}
    pairs = [(p, s) for s in range(seeds) for p in held_out_prompts(prompts, PROMPT_SEED)]
    todo = [pair for pair in pairs if pair not in done]
    if todo:
        warm_up(build_run(home, model=model, prompt=todo[0][0]), pipe, home)
    for prompt, seed in tqdm(todo, desc=suite):
        ledger.add(prompt=prompt, seed=seed, rows=_measure(rows, prompt, seed, model, pipe, home))
    wanted = set(pairs)
    summary = summarise([r for r in ledger.lines if (r["prompt"], r["seed"]) in wanted], pipe)
    partial = out / "results.json.part"
    partial.write_text(json.dumps({"suite": suite, "model": model, **summary}, indent=1))
    os.replace(partial, out / "results.json")
    (out / "report.md").write_text(table(summary))
    _plot(summary, out / "pareto.png")
    return {"suite": suite, "out": str(out), **summary}


def _key(rows: dict[str, Row], model: str, pipe, home) -> str:
    """Changes with the runs of the rows, every knob of their methods, the weights and the machine."""
    runs = [build_run(home, model=model, prompt="-", **row.settings()) for row in rows.values()]
    methods = [build_methods(run.methods) for run in runs]
    knobs = [[method.model_dump() for method in own] for own in methods]
    students = [hash_of(file) for own in methods for method in own for file in method.files(resolve(model))]
    what = (list(rows), [run.model_dump() for run in runs], knobs, weights(model), machine(pipe))
    return digest(*what, *([students] if students else []))


def _measure(rows: dict[str, Row], prompt: str, seed: int, model: str, pipe, home) -> dict[str, dict]:
    """One prompt through all rows of a suite."""
    results: dict[str, dict] = {}
    plain: Video | None = None
    for name, row in rows.items():
        run = build_run(home, model=model, prompt=prompt, seed=seed, **row.settings())
        with first_order(pipe, run.steps) if row.euler else nullcontext():
            video = generate(run, pipe, home)
        plain = plain or video
        likeness = distance(plain.frames, video.frames)
        results[name] = {
            "denoise": video.seconds["denoise"],
            "total": sum(video.seconds.values()),
            "decode": video.seconds["decode"],
            "flops": video.trace.work()[0],
            **{k: likeness[k] for k in ("psnr", "ssim", "ssim_worst")},
            **ratios((plain.latents, plain.frames), (video.latents, video.frames)),
            "adherence": score(video.frames, prompt) if home.captions else {},
        }
    return results


def summarise(lines: list[dict], pipe) -> dict:
    """Per row: medians of time and speed, work, and means of quality with 95 % bootstrap intervals."""
    names = list(lines[0]["rows"])
    rows = {
        name: _row([line["rows"][name] for line in lines], [line["rows"][names[0]] for line in lines]) for name in names
    }
    return {**machine(pipe), "n": len(lines), "rows": rows}


def _row(own: list[dict], base: list[dict]) -> dict:
    seconds = float(np.median([r["denoise"] for r in own]))
    speed = [b["denoise"] / r["denoise"] for r, b in zip(own, base)]
    work = float(np.median([r["flops"] / b["flops"] for r, b in zip(own, base)]))
    psnr = [r["psnr"] for r in own if r["psnr"] is not None]
    row = {
        "seconds": seconds,
        "decode": float(np.median([r["decode"] for r in own])),
        "speedup": float(np.median(speed)),
        "speedup_range": [float(q) for q in np.quantile(speed, (0.05, 0.95))],
        "work": work,
        "efficiency": float(np.median(speed)) * work,
        "ssim": interval([r["ssim"] for r in own]),
        "ssim_worst": min(r["ssim_worst"] for r in own),
        "psnr": interval(psnr) if psnr else None,
    }
    for name in [key for key in RATIOS if all(key in r for r in own)]:
        row[name] = interval([r[name] for r in own])
    if own[0]["adherence"]:
        row["adherence"] = interval([r["adherence"]["mean"] for r in own])
        row["difference"] = interval([r["adherence"]["mean"] - b["adherence"]["mean"] for r, b in zip(own, base)])
        row["attributes"] = {a: interval([r["adherence"][a] for r in own]) for a in ATTRIBUTES}
    return row


def table(summary: dict) -> str:
    """The summary as a Markdown table."""
    where = f"{summary['device']}, {summary['threads']} threads, {summary['dtype']}"
    head = (
        f"n = {summary['n']} held-out prompts and seeds, {where}; "
        "means with 95 % bootstrap intervals, speed-up: median and 5-95 % range\n\n"
        "| setting | denoise s | speed-up | work | efficiency | SSIM | worst | PSNR dB | adherence | - baseline |\n"
        "|---|---|---|---|---|---|---|---|---|---|\n"
    )
    lines = []
    for name, r in summary["rows"].items():
        low, high = r["speedup_range"]
        cells = [name, f"{r['seconds']:.2f}", f"{r['speedup']:.2f} [{low:.2f}, {high:.2f}]", f"{r['work']:.2f}"]
        cells += [f"{r['efficiency']:.2f}", spell(r["ssim"], 4), f"{r['ssim_worst']:.3f}"]
        cells += ["equal" if r["psnr"] is None else spell(r["psnr"], 1)]
        cells += [spell(r[k]) if k in r else "-" for k in ("adherence", "difference")]
        lines.append("| " + " | ".join(cells) + " |\n")
    return head + "".join(lines)


def _plot(summary: dict, path: Path) -> None:
    """Speed against likeness, one point a row."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4))
    for name, row in summary["rows"].items():
        mean, low, high = row["ssim"]
        axes.errorbar(row["speedup"], mean, yerr=[[mean - low], [high - mean]], fmt="o", capsize=3)
        axes.annotate(name, (row["speedup"], mean), textcoords="offset points", xytext=(6, 6))
    axes.set(xlabel="measured speed-up of the denoising", ylabel="SSIM to the baseline", title=f"n = {summary['n']}")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)
