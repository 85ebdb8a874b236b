"""What removing tokens costs, measured: by block, by span of the run, and for queries and keys/values apart.

Each setting removes `RATE` of one feature's tokens in one block during one span (a fifth of the steps) and nothing
elsewhere; its cost is the squared error of the frames against the plain run of the same noise. AsymRnR spreads its
budget by these costs. Beside them: every block at once, at several rates, for the whole curve, also with what is missed
carried, and the ways to merge.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from tqdm import tqdm

from ..families import family_of
from ..methods import AsymRnR
from ..methods.asymrnr.budget import PROFILE, Profile, Table
from ..runtime.generate import Run, build_run, environment, generate, grid, warm_up
from ..runtime.models import ModelDefaults, load_pipeline, model_defaults, resolve, weights
from ..runtime.paths import ROOT
from ..world.judge import score
from ..world.scene import held_out_prompts
from .metrics import distance
from .result_log import ResultLog, config_hash
from .stats import format_interval, interval

RATE, SPANS = 0.5, 5
ALONE = {"schedule": "fixed", "correction": "none"}  # reduction as it is: nothing hides what it misses
CARRIED = "both, with correction,"
LATE = 0.2  # share of the steps before the first reduced one, where all blocks are reduced at once
MERGES = [(merge, bias) for merge in ("mean", "values", "replace") for bias in (True, False)]
RATES = (0.2, 0.4, 0.6, 0.8)
FEATURES = ("query", "kv")
PROMPT_SEED = 7  # other prompts than those figures are reported on


def run_profile(model: str, prompts: int, steps: int | None, out: Path) -> dict:
    """Costs of a model, after writing asymrnr.json, profile.md and profile.png; a local model gets its asymrnr.json."""
    pipe = load_pipeline(model)
    defaults = model_defaults(pipe, model)
    if (count := defaults.steps if steps is None else steps) <= SPANS:
        raise ValueError(f"{count} steps are too few: each of the {SPANS} spans needs one beside the first step")
    out.mkdir(parents=True, exist_ok=True)
    layers = list(family_of(pipe).attentions(pipe.transformer))
    settings = _everywhere() | _merges() | _single(layers)
    texts = held_out_prompts(prompts, PROMPT_SEED) if defaults.toy_world else _examples(prompts)
    runs = [build_run(defaults, model=model, prompt=text, seed=i, steps=steps) for i, text in enumerate(texts)]
    others = [pair for pair in weights(model) if pair[0] != PROFILE]
    asked = runs[0].model_dump(exclude={"prompt", "seed"})
    result_log = ResultLog(
        out / "profile.jsonl", config_hash(settings, AsymRnR().model_dump(), others, asked, environment(pipe))
    )
    done = {(line["prompt"], line["name"]) for line in result_log.lines}
    warm_up(runs[0], pipe, defaults)
    with tqdm(total=len(runs) * len(settings), desc="profile") as bar:
        for run in runs:
            _measure(run, settings, done, result_log, pipe, defaults, bar)
    wanted = [line for line in result_log.lines if line["prompt"] in texts]
    costs = _costs(wanted, layers)
    about = {"model": model, "prompts": prompts, "steps": runs[0].steps, **environment(pipe)}
    (out / "profile.md").write_text(_report(wanted, costs, about))
    _plot(wanted, costs, out / "profile.png")
    profile = Profile(grid=grid(pipe, runs[0]), steps=runs[0].steps, rate=RATE, costs=costs)
    places = [out] + [Path(resolve(model))] * Path(resolve(model)).is_dir()
    for folder in places:
        profile.save(folder / PROFILE)
    return {**about, "costs": costs, "written": [str(folder / PROFILE) for folder in places]}


def _everywhere() -> dict[str, dict]:
    """Settings that remove one feature's tokens, or both's, in all blocks, by name."""
    names = {"query": {"kv_rate": 0.0}, "kv": {"query_rate": 0.0}, "both": {}, CARRIED: {"correction": "linear"}}
    return {
        f"{name} {rate}": {**ALONE, "start": LATE, "query_rate": rate, "kv_rate": rate, **other}
        for name, other in names.items()
        for rate in RATES
    }


def _merges() -> dict[str, dict]:
    """Settings that remove `RATE` of both in all blocks, by what becomes of the removed tokens."""
    both = {**ALONE, "start": LATE, "query_rate": RATE, "kv_rate": RATE}
    weighed = {True: "weighed by size", False: "not weighed"}
    return {f"both {RATE}, {merge}, {weighed[bias]}": {**both, "merge": merge, "bias": bias} for merge, bias in MERGES}


def _single(layers: list[str]) -> dict[str, dict]:
    """Settings that remove one feature's tokens in one block during one span, by name."""
    pair = {"query": (RATE, 0.0), "kv": (0.0, RATE)}
    spans = lambda span, feature: [pair[feature] if s == span else (0.0, 0.0) for s in range(SPANS)]
    return {
        f"{layer} {span} {feature}": {**ALONE, "start": 0.0, "rates": {layer: spans(span, feature)}}
        for layer in layers
        for span in range(SPANS)
        for feature in FEATURES
    }


def _examples(n: int) -> list[str]:
    lines = (ROOT / "examples" / "prompts.txt").read_text().splitlines()
    if n > len(lines):
        raise ValueError(f"{n} prompts are too many: examples/prompts.txt has {len(lines)}")
    return lines[:n]


def _measure(
    run: Run, settings: dict[str, dict], done: set, result_log: ResultLog, pipe, defaults: ModelDefaults, bar: tqdm
) -> None:
    """One prompt through all settings that were not measured yet, each against the plain run."""
    todo = [name for name in settings if (run.prompt, name) not in done]
    bar.update(len(settings) - len(todo))
    plain = generate(run, pipe, defaults) if todo else None
    for name in todo:
        video = generate(run.model_copy(update={"methods": {"asymrnr": settings[name]}}), pipe, defaults)
        if video.trace.messages:  # with fixed rates only about what keeps it from acting
            raise ValueError(f"nothing to measure: {video.trace.messages[0]}")
        error = (plain.frames.astype(np.float64) - video.frames) / 255
        marks = [score(v.frames, run.prompt).get("mean") if defaults.toy_world else None for v in (plain, video)]
        result_log.add(
            prompt=run.prompt, name=name, mse=float(np.square(error).mean()), adherence=marks,
            ssim=distance(plain.frames, video.frames)["ssim"], flops_ratio=video.trace.summary()["flops_ratio"],
        )  # fmt: skip
        bar.update()


def _costs(lines: list[dict], layers: list[str]) -> Table:
    """Mean squared errors, in parts of the largest."""
    by_name: dict[str, list[float]] = {}
    for line in lines:
        by_name.setdefault(line["name"], []).append(line["mse"])
    mean = lambda *key: float(np.mean(by_name[" ".join(map(str, key))]))
    costs = {layer: [tuple(mean(layer, s, f) for f in FEATURES) for s in range(SPANS)] for layer in layers}
    most = max(cost for spans in costs.values() for pair in spans for cost in pair)
    return {layer: [tuple(round(c / most, 5) for c in pair) for pair in spans] for layer, spans in costs.items()}


def _report(lines: list[dict], costs: Table, about: dict) -> str:
    """Two tables: every block at several rates, and the cost of each block alone."""
    text = (
        f"{about['model']}, {about['prompts']} held-out prompts, {about['steps']} steps, {about['device']}, "
        f"{about['dtype']}; means with 95 % bootstrap intervals\n\n"
        f"| all blocks, from {LATE:.0%} of the steps on | work | SSIM | adherence - baseline |\n|---|---|---|---|\n"
    )
    for name in _everywhere() | _merges():
        own = [line for line in lines if line["name"] == name]
        work = np.mean([line["flops_ratio"] for line in own])
        lost = [line["adherence"][1] - line["adherence"][0] for line in own if line["adherence"][0] is not None]
        ssim = format_interval(interval([line["ssim"] for line in own]), 4)
        text += f"| {name} | {work:.2f} | {ssim} | {format_interval(interval(lost)) if lost else '-'} |\n"
    names = [f"{feature}, span {s + 1}" for s in range(SPANS) for feature in FEATURES]
    text += f"\nCost of each block alone at rate {RATE}, in parts of the largest, by fifth of the steps\n\n"
    text += f"| block | {' | '.join(names)} |\n|---|{'---|' * len(names)}\n"
    for layer, spans in costs.items():
        text += f"| {layer} | {' | '.join(f'{cost:.4f}' for pair in spans for cost in pair)} |\n"
    return text


def _plot(lines: list[dict], costs: Table, path: Path) -> None:
    """The curve of likeness against rate, and the costs as two maps, block by span."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(11, 4), layout="constrained")
    for kind in ("query", "kv", "both", CARRIED):
        shown = {r: [line["ssim"] for line in lines if line["name"] == f"{kind} {r}"] for r in RATES}
        axes[0].plot(RATES, [np.mean(v) for v in shown.values()], marker="o", label=kind.strip(","))
    axes[0].set(xlabel="rate in all blocks", ylabel="SSIM to the baseline", title="likeness")
    axes[0].legend()
    maps = np.array(list(costs.values()))  # (blocks, spans, features)
    for i, feature in enumerate(FEATURES):
        image = axes[i + 1].imshow(maps[:, :, i], vmin=0, vmax=1, aspect="auto", cmap="magma")
        axes[i + 1].set(xlabel="span of the steps", ylabel="block", title=f"cost of removing: {feature}")
        axes[i + 1].set_xticks(range(SPANS), [str(s + 1) for s in range(SPANS)])
    figure.colorbar(image, ax=axes[2])
    figure.savefig(path, dpi=120)
    plt.close(figure)
