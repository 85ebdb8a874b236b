"""Suites of settings on held-out prompts: quality and speed of each against the plain run of the same noise.

Settings are generated in turn for each prompt, so that a slow minute of the machine hits all of them. Every result
is a line of `results.jsonl` as soon as it is there; a second start goes on where the first one stopped.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import numpy as np
from tqdm import tqdm

from .metrics import distance, interval
from .models import hash_file, home_of, load_pipeline, resolve
from .presets import load_preset
from .run import Video, build_run, generate, machine, warm_up
from .world.judge import score
from .world.scene import ATTRIBUTES, held_out_prompts

# suite -> row -> preset (None: plain), steps (None: the model's own); the others are held against the first row
Rows = dict[str, tuple[str | None, int | None]]
SUITES: dict[str, Rows] = {
    "base": {"baseline": (None, None)},
    "fastercache": {
        "baseline": (None, None),
        "fastercache": ("fastercache", None),
        "fewer steps: 30": (None, 30),
        "fewer steps: 25": (None, 25),
    },
}
PROMPT_SEED = 2026  # of the held-out prompts that figures are reported on; nothing is tuned to them


def run_suite(suite: str, prompts: int, seeds: int, model: str, out: Path) -> dict:
    """The summary of a suite, after writing results.json, report.md and pareto.png. Raises ValueError if unknown."""
    if suite not in SUITES:
        raise ValueError(f"unknown suite {suite!r}; there are {', '.join(SUITES)}")
    pipe = load_pipeline(model)
    home = home_of(pipe, model)
    out.mkdir(parents=True, exist_ok=True)
    file, key = out / "results.jsonl", _key(SUITES[suite], model)
    lines = [r for r in _lines(file) if r["key"] == key]
    done = {(r["prompt"], r["seed"]) for r in lines}
    pairs = [(p, s) for s in range(seeds) for p in held_out_prompts(prompts, PROMPT_SEED)]
    todo = [pair for pair in pairs if pair not in done]
    if todo:
        warm_up(build_run(home, model=model, prompt=todo[0][0]), pipe, home)
    with open(file, "a") as log:
        for prompt, seed in tqdm(todo, desc=suite):
            rows = _measure(SUITES[suite], prompt, seed, model, pipe, home)
            line = {"key": key, "prompt": prompt, "seed": seed, "rows": rows}
            lines.append(line)
            log.write(json.dumps(line) + "\n")
            log.flush()
    wanted = set(pairs)
    summary = summarise([r for r in lines if (r["prompt"], r["seed"]) in wanted], pipe)
    partial = out / "results.json.part"
    partial.write_text(json.dumps({"suite": suite, "model": model, **summary}, indent=1))
    os.replace(partial, out / "results.json")
    (out / "report.md").write_text(table(summary))
    _plot(summary, out / "pareto.png")
    return {"suite": suite, "out": str(out), **summary}


def _key(rows: Rows, model: str) -> str:
    """Changes with the rows, their presets and the model's weights: older results are then not counted in."""
    presets = [load_preset(preset).model_dump() if preset else None for preset, _ in rows.values()]
    weights = [(f.name, f.stat().st_size, hash_file(f)) for f in sorted(Path(resolve(model)).rglob("*.safetensors"))]
    return hashlib.sha256(json.dumps([rows, presets, weights]).encode()).hexdigest()[:16]


def _lines(file: Path) -> list[dict]:
    """The whole lines of a results file; a line that a kill cut short is dropped."""
    text = file.read_text() if file.is_file() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def _measure(rows: Rows, prompt: str, seed: int, model: str, pipe, home) -> dict[str, dict]:
    """One prompt through all rows of a suite."""
    results: dict[str, dict] = {}
    plain: Video | None = None
    for name, (preset, steps) in rows.items():
        chosen = load_preset(preset) if preset else None
        own = {"methods": chosen.methods, "steps": chosen.steps, "guidance": chosen.guidance} if chosen else {}
        own |= {"steps": steps} if steps else {}
        run = build_run(home, model=model, prompt=prompt, seed=seed, **own)
        video = generate(run, pipe, home)
        plain = plain or video
        likeness = distance(plain.frames, video.frames)
        results[name] = {
            "denoise": video.seconds["denoise"],
            "total": sum(video.seconds.values()),
            "decode": video.seconds["decode"],
            "flops": video.trace.work()[0],
            **{k: likeness[k] for k in ("psnr", "ssim", "ssim_worst")},
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
    work = own[0]["flops"] / base[0]["flops"]
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
    span = lambda v, digits=3: f"{v[0]:.{digits}f} [{v[1]:.{digits}f}, {v[2]:.{digits}f}]"
    lines = []
    for name, r in summary["rows"].items():
        low, high = r["speedup_range"]
        cells = [name, f"{r['seconds']:.2f}", f"{r['speedup']:.2f} [{low:.2f}, {high:.2f}]", f"{r['work']:.2f}"]
        cells += [f"{r['efficiency']:.2f}", span(r["ssim"], 4), f"{r['ssim_worst']:.3f}"]
        cells += ["equal" if r["psnr"] is None else span(r["psnr"], 1)]
        cells += [span(r[k]) if k in r else "-" for k in ("adherence", "difference")]
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
