"""Runs a suite on held-out prompts: speed and quality of each setting against the baseline of the same noise."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
from accelerate import PartialState

from ..errors import AccelError
from ..files import only_writer, write_json
from ..runtime.generate import environment
from ..runtime.models import load_pipeline, model_defaults
from ..runtime.presets import build_methods
from ..runtime.run import smallest_size
from .front import Groups, best_settings, finalists, front_table, plot_summary, with_front
from .measure import Case, by_case, measure_in_turn, refused_peers, refused_settings, settings_keys
from .metrics import METRICS, Metric, Pair, measure, metrics_of
from .overhead import PAIRS, overheads
from .report import pairs_table, summarize, table
from .result_log import ResultLog, read_results
from .suites import BASELINE, NEUTRAL, NOISE_FLOOR, OVERVIEW, PROMPT_SEED, SUITES, TUNING_SEED, Setting, check_suite

TUNING_PROMPTS = 3  # on which all settings of a suite with groups are tried
FINAL_PROMPTS = 6  # those and more, on which the finalists are compared: of three, one hard prompt would decide
TUNING_NOISE = 0  # the seed of all tuning prompts
SEED_STRIDE = 1000  # between the noises of a prompt; more than there are prompts
FINALISTS = 2  # of each group in each speed class


def run_suite(
    suite: str, prompts: int, seeds: int, model: str, out: Path, state: PartialState | None = None
) -> dict:  # fmt: skip
    """The summary of a suite, after writing results.json, report.md and pareto.png. A second call resumes the first.

    Of several processes, each measures a part, and only the first writes the results; the others return {}.
    Raises AccelError for an unknown suite, or if `out` holds results of more prompts, of another model, or of settings
    that this suite does not have here.
    """
    check_suite(suite)
    # without `cpu`, those that torchrun starts on a CPU stay apart; the first to finish waits as long as it takes
    state = state or PartialState(cpu=not torch.accelerator.is_available(), timeout=timedelta(days=9))
    with only_writer(out) if state.is_main_process else nullcontext():
        summary = _measure_suite(suite, prompts, seeds, model, out, state)
        if not state.is_main_process:
            return {}
        summary = {"suite": suite, "model": model, **summary}
        write_json(out / "results.json", summary)
        parts = {"classes": front_table, "rows": partial(table, kind="report"), "pairs": pairs_table}
        (out / "report.md").write_text("\n".join(make(summary) for key, make in parts.items() if summary.get(key)))
        plot_summary(summary, out / "pareto.png")
    return {"out": str(out), **summary}


def _measure_suite(suite: str, prompts: int, seeds: int, model: str, out: Path, state: PartialState) -> dict:
    from ..world.scene import held_out_prompts

    settings = {name: setting for name, setting in SUITES[suite].settings.items() if setting.is_available(model)}
    _check_out(out / "results.json", settings, prompts, seeds, model)
    if state.is_main_process and (missing := SUITES[suite].settings.keys() - settings.keys()):
        print(
            f"skipped, as what they need was not trained, fitted or installed: {', '.join(sorted(missing))}",
            file=sys.stderr,
        )
    pipe = load_pipeline(model)
    defaults = model_defaults(pipe, model)
    texts = held_out_prompts(prompts, PROMPT_SEED)
    cases = report_cases(texts, seeds)
    refused = refused_settings(settings, pipe, defaults, model=model)
    settings = {name: setting for name, setting in settings.items() if name not in refused}
    peers = refused_peers(settings, cases[0], pipe, defaults, model=model)
    settings = {name: s for name, s in settings.items() if not peers.keys() & s.settings()["methods"].keys()}
    refused |= peers
    keys = settings_keys(settings, model, pipe, defaults)

    def measured(settings: dict[str, Setting], cases: Sequence[Case], metrics: list[Metric], file: str, title: str):
        log = ResultLog(out / file, keys, state)
        record = lambda name, run, baseline, video: measure(Pair(baseline, video, run.prompt), metrics)
        lines = measure_in_turn(settings, cases, {"model": model}, log, pipe, defaults, record, title)
        lacking = settings.keys() - {line["setting"] for line in lines}
        refused.update({name: f"there is not enough memory for {name}" for name in sorted(lacking)})
        return lines

    groups = {group: [n for n in names if n in settings] for group, names in SUITES[suite].groups.items()}
    classes, about = [], {}
    if groups:
        classes, about = _choose(measured, settings, groups)
        kept = {*BASELINE, NEUTRAL, NOISE_FLOOR, *OVERVIEW.values()}
        kept = kept.union(*SUITES[suite].pairs, *(found["best"].values() for found in classes))
        settings = {name: setting for name, setting in settings.items() if name in kept}
    lines = measured(settings, cases, metrics_of(defaults), "results.jsonl", suite)
    if not state.is_main_process:
        return {}
    classes = [{**c, "best": {g: name for g, name in c["best"].items() if name not in refused}} for c in classes]
    cases = by_case(lines)
    summary = {**environment(pipe), **summarize(cases, SUITES[suite].pairs), **about, "refused": refused}
    if not groups:
        return summary
    neutral = build_methods(settings[NEUTRAL].settings()["methods"])
    call = {
        "prompt": texts[0], "height": defaults.height, "width": defaults.width, "num_frames": defaults.frames,
        "guidance_scale": defaults.guidance, "max_sequence_length": defaults.text_length,
    }  # fmt: skip
    small = smallest_size(pipe)
    return with_front(summary, cases, groups, classes, overheads(pipe, call, small, neutral, PAIRS))


def report_cases(prompts: Sequence[str], seeds: int) -> list[Case]:
    """Each prompt with noises of its own, not those of the tuning prompts: one noise for all would decide much.

    The noise of a prompt does not depend on how many there are.
    """
    return [(text, 1 + i + SEED_STRIDE * k) for k in range(seeds) for i, text in enumerate(prompts)]


def _choose(measured: Callable, settings: dict[str, Setting], groups: Groups) -> tuple[list[dict], dict]:
    """The classes of `best_settings`, and how many settings were tried on how many prompts, which are not reported on.

    All settings are tried on `TUNING_PROMPTS` prompts, the finalists on `FINAL_PROMPTS`.
    """
    from ..world.scene import held_out_prompts

    tuning = [(prompt, TUNING_NOISE) for prompt in held_out_prompts(FINAL_PROMPTS, TUNING_SEED)]
    rows_of = lambda settings, cases, title: summarize(
        by_case(measured(settings, cases, [METRICS["ssim"]], "tuning.jsonl", title))
    )["rows"]
    rows = rows_of(settings, tuning[:TUNING_PROMPTS], "tuning prompts")
    tried = sum(name in rows for names in groups.values() for name in names)
    best = finalists(rows, {g: [n for n in names if n in rows] for g, names in groups.items()}, FINALISTS)
    final = {name: setting for name, setting in settings.items() if name in {*BASELINE, *best}}
    rows = rows_of(final, tuning, "finalists")
    classes = best_settings(rows, {g: [n for n in names if n in best and n in rows] for g, names in groups.items()})
    return classes, {
        "tried": tried, "tuning_prompts": TUNING_PROMPTS, "finalists": len(best), "final_prompts": FINAL_PROMPTS,
    }  # fmt: skip


def _check_out(file: Path, settings: dict[str, Setting], prompts: int, seeds: int, model: str) -> None:
    """Raise AccelError if results exist here that fewer results, or those of another model, would replace."""
    found = read_results(file, "bench") if file.is_file() else {"n": 0, "prompts": 0, "rows": {}}
    if (other := found.get("model", model)) != model:
        raise AccelError(f"{file.parent} holds results of {other}: give another --out, or delete it first")
    counts = found.get("n"), found.get("prompts")
    if not isinstance(found.get("rows"), dict) or not all(isinstance(count, int) for count in counts):
        raise AccelError(f"{file} was not written by `accel bench`: give another --out")
    lost = [name for name in found["rows"] if name not in settings]
    if lost or found["n"] > prompts * seeds or found["prompts"] > prompts:
        count = f"{found['n']} videos of {found['prompts']} prompts, more than {prompts * seeds} of {prompts}"
        more = f"the settings {', '.join(lost)}" if lost else count
        raise AccelError(f"{file.parent} holds results of {more}: give another --out, or delete it first")
