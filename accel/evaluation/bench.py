"""Suites of settings on held-out prompts: quality and speed of each against the plain run of the same noise.

Settings are generated in turn for each prompt, so that a slow minute of the machine hits all of them. Every result
is a line of `results.jsonl` as soon as it is there; a second start goes on where the first one stopped.
"""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from ..files import atomic_write
from ..runtime.generate import Video, build_run, environment, generate, warm_up
from ..runtime.models import hash_of, load_pipeline, model_defaults, resolve, weights
from ..runtime.presets import Preset, build_methods, load_preset
from ..students.scheduler import euler_sampling
from ..world.judge import score
from ..world.scene import held_out_prompts
from .metrics import distance, relative_metrics
from .report import paired, plot, summarise, table
from .result_log import ResultLog, config_hash


@dataclass(frozen=True)
class Setting:
    """One setting of a suite: a preset (None: plain), the model's own steps and guidance or others, other knobs.

    `euler`: with the first-order solver in place of the model's own, on the same noise levels.
    """

    preset: str | None = None
    steps: int | None = None
    guidance: float | None = None
    euler: bool = False
    overrides: dict[str, dict] = field(default_factory=dict)

    def settings(self) -> dict:
        """What it sets of a run; None where the model's own value stays."""
        preset = load_preset(self.preset) if self.preset else Preset()
        methods = {name: {**preset.methods.get(name, {}), **self.overrides.get(name, {})} for name in
                   dict.fromkeys((*preset.methods, *self.overrides))}  # fmt: skip
        return {"methods": methods, "steps": self.steps or preset.steps, "guidance": self.guidance or preset.guidance}

    def is_available(self, model: str) -> bool:
        """Whether the students and predictors that its methods need for a model are there."""
        folders = [method.weights_dir(resolve(model)) for method in build_methods(self.settings()["methods"])]
        return all(folder is None or folder.is_dir() for folder in folders)


def _asymrnr(**parameters) -> Setting:
    return Setting("asymrnr", overrides={"asymrnr": parameters})


def _arms(*names: str) -> dict[str, Setting]:
    """GPD's rivals, as `python -m accel train gpd --arm NAME` leaves them."""
    return {name: Setting("gpd", overrides={"gpd": {"student": f"checkpoints/{name}/gpd-N6"}}) for name in names}


ABLATIONS = {  # of training/teach.py, by suite: other ways from 48 steps to 6, other ways to take in the guidance
    "gpd-ablations": ("halving", "direct"),
    "gpd-guidance": ("annealed", "guidance-only", "no-constraint"),
}
PLAIN = {"baseline": Setting()}
CACHE_ALONE = {"attention_interval": 3, "guidance_interval": 9, "guidance_start": 0.2}  # the time of both together
UNCARRIED = {"correction": "none", "budget": 0.75, "start": 0.3, "matching": "global", "merge": "values", "bias": True}
CURVE = ((0.32, 5), (0.28, 6), (0.24, 9))  # what is left of the attention, and by whole attentions how far apart
# suite -> row -> setting; the others are held against the first row
SUITES: dict[str, dict[str, Setting]] = {
    "base": PLAIN,
    "fastercache": PLAIN | {"fastercache": Setting("fastercache"), "baseline, 30 steps": Setting(steps=30)},
    "asymrnr": PLAIN
    | {name: Setting(name) for name in ("asymrnr", "asymrnr-official", "tome", "todo")}
    | {
        "asymrnr, schedule by similarity": _asymrnr(schedule="similarity"),
        "asymrnr, averaged and weighted by size": _asymrnr(merge="values", bias=True),
        "asymrnr, correction from the last residual": _asymrnr(correction="last"),
        "asymrnr, no correction": _asymrnr(**UNCARRIED),
        "baseline, 38 steps": Setting(steps=38),
    },
    "balanced": PLAIN
    | {
        "fastercache + asymrnr": Setting("balanced"),
        "fastercache, matched time": Setting("fastercache", overrides={"fastercache": CACHE_ALONE}),
        "baseline, 24 steps": Setting(steps=24),
    },
    "asymrnr-curve": PLAIN
    | {f"asymrnr, budget {share}": _asymrnr(budget=share) for share in (0.9, 0.8, 0.7, 0.6, 0.5, 0.4)}
    | {f"asymrnr, budget {share}, full every {n}": _asymrnr(budget=share, interval=n) for share, n in CURVE}
    | {f"baseline, {n} steps": Setting(steps=n) for n in (47, 43, 38, 35)},
    "gpd": {"baseline, 48 steps": Setting(steps=48)}
    | {f"gpd, {n} steps": Setting("gpd", overrides={"gpd": {"steps": n}}) for n in (6, 8, 12, 16, 24)}
    | {f"baseline, {n} steps": Setting(steps=n) for n in (24, 12, 6)}
    | {
        "Euler, 48 steps": Setting(steps=48, euler=True),
        "Euler, 6 steps": Setting(steps=6, euler=True),
        "baseline, 3 steps (equal NFE)": Setting(steps=3),
        "baseline, 6 steps, no guidance": Setting(steps=6, guidance=1.0),
    },
}
SUITES |= {
    suite: {"baseline, 48 steps": Setting(steps=48), "gpd": Setting("gpd")} | _arms(*names)
    for suite, names in ABLATIONS.items()
}
_MEANS = {"meanflow": "", "guidance distilled": "checkpoints/meanflow/guidance-only"}
MEANS = {  # students of MeanFlow and where they lie, by suite: the method and what it begins with; its rivals too
    "meanflow": _MEANS,
    "meanflow-ablations": _MEANS
    | {
        "even intervals": "checkpoints/even/meanflow",
        "unrestricted (R = 1)": "checkpoints/unrestricted/meanflow",
        "mean velocities of the base": "checkpoints/guided/meanflow",
    },
}
SUITES |= {
    suite: PLAIN
    | {
        f"{name}, {n} steps": Setting("meanflow", overrides={"meanflow": {"steps": n, "student": at}})
        for name, at in students.items()
        for n in (20, 10)
    }
    | {f"baseline, {n} steps": Setting(steps=n) for n in (20, 10, 5)}
    for suite, students in MEANS.items()
}
SUITES["disca"] = PLAIN | {
    "disca": Setting("disca"),
    "disca, predictor of the paper": Setting("disca", overrides={"disca": {"predictor": "paper"}}),
    "disca, regression stage alone": Setting("disca", overrides={"disca": {"predictor_dir": "checkpoints/predictor/match-only"}}),
    **{f"{form} at the same full steps": Setting("disca", overrides={"disca": {"predictor": form}})
       for form in ("reuse", "taylor-1", "taylor-2")},
    **{f"meanflow, {n} steps": Setting("meanflow", overrides={"meanflow": {"steps": n}}) for n in (20, 12, 10, 8, 6)},
    **{f"baseline, {n} steps": Setting(steps=n) for n in (6, 5)},
    "Euler, 5 steps": Setting(steps=5, euler=True),
    "turbo": Setting("turbo"),
}  # fmt: skip
PAIRS = {  # suite -> rows that are held against each other
    "asymrnr": [("asymrnr", name) for name in
                ("asymrnr-official", "tome", "todo", "asymrnr, schedule by similarity", "asymrnr, averaged and weighted by size",
                 "asymrnr, correction from the last residual", "asymrnr, no correction", "baseline, 38 steps")],
    "balanced": [("fastercache + asymrnr", name) for name in ("fastercache, matched time", "baseline, 24 steps")],
    "gpd": [("gpd, 6 steps", name) for name in
            ("Euler, 6 steps", "baseline, 6 steps", "baseline, 3 steps (equal NFE)", "baseline, 6 steps, no guidance")]
           + [("gpd, 12 steps", "baseline, 6 steps"), ("gpd, 24 steps", "baseline, 12 steps")],
    **{suite: [("gpd", name) for name in names] for suite, names in ABLATIONS.items()},
    **{suite: [(f"meanflow, {n} steps", f"{name}, {n} steps") for n in (20, 10) for name in list(students)[1:]]
              + [("meanflow, 20 steps", "baseline, 10 steps")] for suite, students in MEANS.items()},
    "disca": [("disca", name) for name in
              ("reuse at the same full steps", "taylor-1 at the same full steps", "taylor-2 at the same full steps",
               "disca, predictor of the paper", "disca, regression stage alone", "meanflow, 10 steps", "Euler, 5 steps",
               "baseline, 5 steps")] + [("turbo", "meanflow, 6 steps")],
}  # fmt: skip
PROMPT_SEED = 2026  # of the held-out prompts that figures are reported on; no method is tuned to them


def run_suite(suite: str, prompts: int, seeds: int, model: str, out: Path) -> dict:
    """The summary of a suite, after writing results.json, report.md and pareto.png.

    Raises ValueError for an unknown suite, or where `out` holds results of more prompts, or of rows that cannot be run.
    """
    if suite not in SUITES:
        raise ValueError(f"unknown suite {suite!r}; there are {', '.join(SUITES)}")
    rows = {name: row for name, row in SUITES[suite].items() if row.is_available(model)}
    _check_place(out / "results.json", rows, prompts * seeds)
    if left_out := SUITES[suite].keys() - rows.keys():
        print(f"left out, as nobody has trained them: {', '.join(sorted(left_out))}", file=sys.stderr)
    pipe = load_pipeline(model)
    defaults = model_defaults(pipe, model)
    out.mkdir(parents=True, exist_ok=True)
    result_log = ResultLog(out / "results.jsonl", _key(rows, model, pipe, defaults))
    done = {(r["prompt"], r["seed"]) for r in result_log.lines}
    pairs = [(p, s) for s in range(seeds) for p in held_out_prompts(prompts, PROMPT_SEED)]
    todo = [pair for pair in pairs if pair not in done]
    if todo:
        warm_up(build_run(defaults, model=model, prompt=todo[0][0]), pipe, defaults)
    for prompt, seed in tqdm(todo, desc=suite):
        result_log.add(prompt=prompt, seed=seed, rows=_measure(rows, prompt, seed, model, pipe, defaults))
    wanted = set(pairs)
    lines = [line for line in result_log.lines if (line["prompt"], line["seed"]) in wanted]
    summary = {**environment(pipe), **summarise(lines, PAIRS.get(suite, ()))}
    with atomic_write(out / "results.json") as part:
        part.write_text(json.dumps({"suite": suite, "model": model, **summary}, indent=1))
    (out / "report.md").write_text(table(summary) + (f"\n{paired(summary)}" if summary["pairs"] else ""))
    plot(summary, out / "pareto.png")
    return {"suite": suite, "out": str(out), **summary}


def _check_place(file: Path, rows: dict[str, Setting], n: int) -> None:
    """Raise ValueError if results lie here already that fewer would replace."""
    there = json.loads(file.read_text()) if file.is_file() else {"n": 0, "rows": {}}
    lost = [name for name in there["rows"] if name not in rows]
    if there["n"] > n or lost:
        more = f"the rows {', '.join(lost)}" if lost else f"{there['n']} prompts and seeds, more than {n}"
        raise ValueError(f"{file.parent} holds results of {more}: give another --out, or delete it first")


def _key(rows: dict[str, Setting], model: str, pipe, defaults) -> str:
    """Changes with the runs of the rows, every knob of their methods, the weights and the machine.

    Not with the code: after a change to that which tells on results, the ledger is to be deleted.
    """
    runs = [build_run(defaults, model=model, prompt="-", **row.settings()) for row in rows.values()]
    methods = [build_methods(run.methods) for run in runs]
    parameters = [[method.model_dump() for method in own] for own in methods]
    students = [hash_of(file) for own in methods for method in own for file in method.files(resolve(model))]
    what = (list(rows), [run.model_dump() for run in runs], parameters, weights(model), environment(pipe))
    return config_hash(*what, *([students] if students else []))


def _measure(rows: dict[str, Setting], prompt: str, seed: int, model: str, pipe, defaults) -> dict[str, dict]:
    """One prompt through all rows of a suite."""
    results: dict[str, dict] = {}
    plain: Video | None = None
    for name, row in rows.items():
        run = build_run(defaults, model=model, prompt=prompt, seed=seed, **row.settings())
        with euler_sampling(pipe, run.steps) if row.euler else nullcontext():
            video = generate(run, pipe, defaults)
        plain = plain or video
        similarity = distance(plain.frames, video.frames)
        results[name] = {
            "denoise": video.seconds["denoise"],
            "total": sum(video.seconds.values()),
            "decode": video.seconds["decode"],
            "flops": video.trace.flops_computed_and_full()[0],
            **{k: similarity[k] for k in ("psnr", "ssim", "ssim_worst")},
            **relative_metrics((plain.latents, plain.frames), (video.latents, video.frames)),
            "adherence": score(video.frames, prompt) if defaults.toy_world else {},
        }
    return results
