"""Measures what removing tokens costs in each block, for AsymRnR's profiled schedule.

A setting removes `RATE` of the queries, or of the keys and values, in one block during one span (a fifth of the steps).
Its cost is the squared error of the frames against the baseline of the same noise. Further settings reduce every block
at once: at several rates, with and without correction, and with each way to merge.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..errors import AccelError, amount
from ..families import family_of
from ..methods.asymrnr.budget import PROFILE, Profile, Table
from ..runtime.generate import Video, environment, grid
from ..runtime.models import ModelDefaults, folders_of_results, load_pipeline, model_defaults
from ..runtime.run import Run
from .measure import calibration_cases, measure_in_turn, runs_of, settings_keys
from .metrics import METRICS, Pair, mean_of, metrics_of, ssim_frames
from .report import markdown
from .result_log import ResultLog
from .stats import format_interval, interval
from .suites import Setting

RATE, SPANS = 0.5, 5
UNCORRECTED = {"schedule": "fixed", "correction": "none"}
CORRECTED = "both, with correction,"
START = 0.2  # share of the steps before the first reduced one, where all blocks are reduced at once
MERGES = [(merge, bias) for merge in ("mean", "values", "replace") for bias in (True, False)]
RATES = (0.2, 0.4, 0.6, 0.8)
FEATURES = ("query", "kv")
PROMPT_SEED = 7  # other prompts than those that figures are reported on
BASELINE = {"baseline": Setting()}


def run_profile(model: str, prompts: int, steps: int | None, out: Path) -> dict:
    """Costs of a model, after writing asymrnr.json, profile.md and profile.png. A second call resumes the first.

    A local model gets a copy of asymrnr.json. Raises AccelError if the steps or the example prompts are too few.
    """
    pipe = load_pipeline(model)
    defaults = model_defaults(pipe, model)
    check_steps(defaults.steps if steps is None else steps)
    cases = calibration_cases(prompts, PROMPT_SEED, defaults)
    layers = list(family_of(pipe).attentions(pipe.transformer))
    settings = BASELINE | all_blocks() | merges() | single_blocks(layers)
    common = {"model": model, "steps": steps}
    run = runs_of(BASELINE, cases[0], defaults, **common)["baseline"]
    out.mkdir(parents=True, exist_ok=True)
    keys = settings_keys(settings, model, pipe, defaults, ignore=PROFILE, steps=steps)
    log = ResultLog(out / "profile.jsonl", keys)
    lines = measure_in_turn(settings, cases, common, log, pipe, defaults, _recorder(defaults), "profile")
    if lacking := settings.keys() - {line["setting"] for line in lines}:
        raise AccelError(
            f"there is not enough memory for {', '.join(sorted(lacking))}: make the model or its video smaller"
        )
    lines = [line for line in lines if line["setting"] not in BASELINE]
    costs = _costs(lines, layers)
    about = {"model": model, "prompts": prompts, "steps": run.steps, **environment(pipe)}
    (out / "profile.md").write_text(_report(lines, costs, about))
    _plot(lines, costs, out / "profile.png")
    profile = Profile(grid=grid(pipe, run), steps=run.steps, rate=RATE, costs=costs)
    folders = folders_of_results(model, out)
    for folder in folders:
        profile.save(folder / PROFILE)
    return {**about, "costs": costs, "written": [str(folder / PROFILE) for folder in folders]}


def check_steps(steps: int) -> None:
    """Raise AccelError if there are too few steps for the spans."""
    if steps <= SPANS:
        few = amount(steps, "step is", "steps are")
        raise AccelError(f"{few} too few: each of the {SPANS} spans needs one besides the first step")


def _asymrnr(**parameters) -> Setting:
    return Setting(overrides={"asymrnr": {**UNCORRECTED, **parameters}})


def all_blocks() -> dict[str, Setting]:
    """Settings that remove one feature's tokens, or both's, in all blocks."""
    kinds = {"query": {"kv_rate": 0.0}, "kv": {"query_rate": 0.0}, "both": {}, CORRECTED: {"correction": "linear"}}
    return {
        f"{name} {rate}": _asymrnr(**{"start": START, "query_rate": rate, "kv_rate": rate, **parameters})
        for name, parameters in kinds.items()
        for rate in RATES
    }


def merges() -> dict[str, Setting]:
    """Settings that remove `RATE` of both features' tokens in all blocks, one for each way to merge them."""
    both = {"start": START, "query_rate": RATE, "kv_rate": RATE}
    weighted = {True: "weighted by size", False: "not weighted"}
    return {
        f"both {RATE}, {merge}, {weighted[bias]}": _asymrnr(**both, merge=merge, bias=bias) for merge, bias in MERGES
    }


def single_blocks(layers: list[str]) -> dict[str, Setting]:
    """Settings that remove one feature's tokens in one block during one span, named "layer span feature"."""
    rates = {"query": (RATE, 0.0), "kv": (0.0, RATE)}
    spans = lambda span, feature: [rates[feature] if s == span else (0.0, 0.0) for s in range(SPANS)]
    return {
        f"{layer} {span} {feature}": _asymrnr(start=0.0, rates={layer: spans(span, feature)})
        for layer in layers
        for span in range(SPANS)
        for feature in FEATURES
    }


def _recorder(defaults: ModelDefaults):
    """What is logged of a video: its error, SSIM and work, and the adherence of the baseline and of itself."""
    judged = METRICS["adherence"] in metrics_of(defaults)

    def record(name: str, run: Run, baseline: Video, video: Video) -> dict:
        if video.trace.messages:  # with fixed rates, AsymRnR writes a message only if something keeps it from acting
            raise AccelError(f"nothing to measure: {video.trace.messages[0]}")
        read = lambda shown: (
            mean_of(METRICS["adherence"].measure(Pair(baseline, shown, run.prompt))) if judged else None
        )
        error = (baseline.frames.astype(np.float64) - video.frames) / 255
        return {
            "mse": float(np.square(error).mean()),
            "ssim": float(np.mean(ssim_frames(baseline.frames, video.frames))),
            "flops_ratio": video.trace.summary()["flops_ratio"],
            "adherence": [read(baseline), read(video)],
        }

    return record


def _costs(lines: list[dict], layers: list[str]) -> Table:
    """Mean squared errors of the single blocks, divided by the largest."""
    by_setting: dict[str, list[float]] = {}
    for line in lines:
        by_setting.setdefault(line["setting"], []).append(line["mse"])
    mean = lambda *name: float(np.mean(by_setting[" ".join(map(str, name))]))
    costs = {layer: [tuple(mean(layer, s, f) for f in FEATURES) for s in range(SPANS)] for layer in layers}
    largest = max(cost for spans in costs.values() for pair in spans for cost in pair)
    return {layer: [tuple(round(c / largest, 5) for c in pair) for pair in spans] for layer, spans in costs.items()}


def _report(lines: list[dict], costs: Table, about: dict) -> str:
    """Two tables: all blocks at several rates, and the cost of each block alone."""
    rows = []
    for name in all_blocks() | merges():
        found = [line for line in lines if line["setting"] == name]
        work = np.mean([line["flops_ratio"] for line in found])
        deltas = [line["adherence"][1] - line["adherence"][0] for line in found if line["adherence"][0] is not None]
        ssim = format_interval(interval([line["ssim"] for line in found]), 4)
        rows.append([name, f"{work:.2f}", ssim, format_interval(interval(deltas)) if deltas else "-"])
    head = [f"all blocks, from {START:.0%} of the steps on", "work", "SSIM", "delta adherence"]
    spans = [f"{feature}, span {s + 1}" for s in range(SPANS) for feature in FEATURES]
    single = [[layer, *(f"{cost:.4f}" for pair in spans_of for cost in pair)] for layer, spans_of in costs.items()]
    return (
        f"{about['model']}, {amount(about['prompts'], 'held-out prompt')}, {about['steps']} steps, {about['device']}, "
        f"{about['dtype']}; means with 95 % bootstrap intervals\n\n{markdown(head, rows)}\n"
        f"Cost of each block alone at rate {RATE}, in parts of the largest, by fifth of the steps\n\n"
        f"{markdown(['block', *spans], single)}"
    )


def _plot(lines: list[dict], costs: Table, path: Path) -> None:
    """SSIM against rate, and the costs as two maps of blocks and spans, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(11, 4), layout="constrained")
    for kind in ("query", "kv", "both", CORRECTED):
        shown = {rate: [line["ssim"] for line in lines if line["setting"] == f"{kind} {rate}"] for rate in RATES}
        axes[0].plot(RATES, [np.mean(v) for v in shown.values()], marker="o", label=kind.strip(","))
    axes[0].set(xlabel="rate in all blocks", ylabel="SSIM to the baseline", title="similarity")
    axes[0].legend()
    maps = np.array(list(costs.values()))  # (blocks, spans, features)
    for i, feature in enumerate(FEATURES):
        image = axes[i + 1].imshow(maps[:, :, i], vmin=0, vmax=1, aspect="auto", cmap="magma")
        axes[i + 1].set(xlabel="span of the steps", ylabel="block", title=f"cost of removing: {feature}")
        axes[i + 1].set_xticks(range(SPANS), [str(s + 1) for s in range(SPANS)])
    figure.colorbar(image, ax=axes[2])
    figure.savefig(path, dpi=120)
    plt.close(figure)
