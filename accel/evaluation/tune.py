"""`accel tune`: searches methods, parameters, steps, solver and shift for the settings that lose least at their work.

A try is a point (work, loss): FLOPs in parts of the baseline's, and 1 - SSIM to its videos, the mean over prompts that
no report uses. Both are counted and not timed, so a search gives the same tries for the same seed, whatever else the
machine does, and also where it was stopped and resumed.
"""

from __future__ import annotations

import json
import math
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import optuna
import torch
import yaml
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from tqdm import tqdm

from ..errors import AccelError
from ..files import atomic_write, write_json
from ..methods import METHODS
from ..runtime.generate import Video, environment, generate
from ..runtime.models import ModelDefaults, method_weights, resolve, weights
from ..runtime.presets import Preset
from ..runtime.run import Run, build_run
from ..runtime.solvers import schedule_shift
from .metrics import METRICS, Pair, mean_of
from .pareto_front import MAX_ADHERENCE_LOSS, is_as_fast, keeps_adherence, pareto_front, tuned_within
from .report import markdown
from .result_log import config_hash

STEPS = (50, 40, 32, 25, 20, 16, 13, 10, 8, 6, 5, 4)
WITH_OWN_STEPS = ("fittedsolver", "gpd", "meanflow")  # methods that bring their noise levels
SHIFTS = (2.0, 7.0)  # the smallest and the largest that are tried
RANDOM_TRIES = 10  # after the known settings, before the sampler learns from all of them
SMALLEST_LOSS = 1e-6  # below it, losses count as equal


def tune(
    model: str, pipe, defaults: ModelDefaults, prompts: Sequence[str], trials: int, seed: int, out: Path
) -> list[dict]:
    """All of `trials` tries that the model did not refuse as rows, after writing front.json. A second call resumes.

    The first tries are `known_settings`.
    A row has "preset" (its settings), "work", "speed" (the inverse), "ssim", and "adherence_loss" where the model's
    world is known. Raises AccelError if `out` holds a search of other prompts, weights, device or another seed.
    """
    steps = {name: METHODS[name].available_values(resolve(model)).get("steps", []) for name in WITH_OWN_STEPS}
    own_steps = {name: [n for n in counts if n] for name, counts in steps.items() if any(counts)}
    tried = [METHODS[name](steps=n) for name, counts in own_steps.items() for n in counts]
    has_predictor = "meanflow" in own_steps and METHODS["disca"]().is_available(resolve(model))
    tried += [METHODS["disca"]()] if has_predictor else []
    files = method_weights(tried, model)
    known = known_settings(own_steps, has_predictor, schedule_shift(pipe.scheduler))
    machine = {name: value for name, value in environment(pipe).items() if name != "threads"}  # they change no number
    key = config_hash(list(prompts), seed, weights(model), defaults.model_dump(), known, files, machine)
    study, judge = open_study(out, key), Judge(model, pipe, defaults, prompts)
    found = finished(study)
    with tqdm(total=trials, initial=min(trials, len(found)), desc="tries") as bar:
        while len(found) < trials:
            # a sampler of its own for each try: the choices of a resumed search are those of an unbroken one
            study.sampler = sampler((seed * 100_003 + len(found)) % 2**32, len(known) + RANDOM_TRIES)
            if len(found) < len(known) and not is_waiting(study):
                study.enqueue_trial(known[len(found)])
            trial = study.ask()
            preset = suggest(trial, own_steps, has_predictor)
            same = [row for row in found if row["preset"] == preset.model_dump(exclude_defaults=True)]
            row = same[0] if same else _judged(judge, preset)
            trial.set_user_attr("row", row)
            study.tell(trial, (math.log(row["work"]), math.log(max(SMALLEST_LOSS, 1 - row["ssim"]))))
            found = finished(study)
            bar.update()
    refused = [row["refused"] for row in found[:trials] if "refused" in row]
    if len(refused) == trials:
        raise AccelError(f"all {trials} tries were refused; the first one: {refused[0]}")
    if refused:
        print(f"{len(refused)} of {trials} tries were refused; the first one: {refused[0]}", file=sys.stderr)
    rows = [row for row in found[:trials] if "refused" not in row]
    document = {"model": model, "prompts": list(prompts), "tries": trials, "seed": seed, **environment(pipe)}
    write_json(out / "front.json", {**document, "rows": front(rows)})
    return rows


def _judged(judge: Judge, preset: Preset) -> dict:
    """The row of a preset, or where the model refuses it, one that is worse than the baseline, with the reason."""
    try:
        return judge(preset)
    except AccelError as error:
        refused = str(error)
    except torch.OutOfMemoryError:
        refused = "there is not enough memory"
    settings = preset.model_dump(exclude_defaults=True)
    return {"preset": settings, "work": 1.0, "speed": 1.0, "ssim": 0.0, "refused": refused}


def open_study(out: Path, key: str) -> optuna.Study:
    """The search in a folder, new or begun. Raises AccelError if it is another one."""
    out.mkdir(parents=True, exist_ok=True)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        study = optuna.create_study(
            storage=JournalStorage(JournalFileBackend(str(out / "tries.jsonl"))), study_name="tune",
            directions=("minimize", "minimize"), load_if_exists=True,
        )  # fmt: skip
    if study.user_attrs.get("key", key) != key:
        raise AccelError(
            f"{out} holds a search of other prompts, weights, first tries, device or seed: give another --out"
        )
    study.set_user_attr("key", key)
    for trial in study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,)):  # it was broken off
        study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
    return study


def sampler(seed: int, unguided: int) -> optuna.samplers.TPESampler:
    """The sampler of one try, which learns nothing from the first `unguided` ones."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return optuna.samplers.TPESampler(seed=seed, multivariate=True, group=True, n_startup_trials=unguided)


def is_waiting(study: optuna.Study) -> bool:
    """Whether a known try was put into the study and not begun, because the search was stopped just then."""
    return bool(study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.WAITING,)))


def finished(study: optuna.Study) -> list[dict]:
    """The rows of all finished tries; one that was broken off is not among them."""
    complete = study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,))
    return [trial.user_attrs["row"] for trial in complete]


def known_settings(own_steps: dict[str, list[int]], has_predictor: bool, own_shift: float | None) -> list[dict]:
    """What `suggest` chooses in the first tries: the step cache in many steps, and in fewer at a larger shift, where a
    step changes as much; and methods with their own noise levels in all of their steps.

    `own_shift`: the model's own, as near to it as `suggest` has one.
    """
    cached = {"source": "base", "solver": "unipc", "stepcache": True, "guidance": False, "schedule": "change"}
    own = min(max(round(2 * (own_shift or 3)) / 2, SHIFTS[0]), SHIFTS[1])
    more = min(own + 1, SHIFTS[1])
    found = [
        {**cached, "steps": steps, "shift": shift, "threshold": threshold}
        for steps, shift, threshold in ((50, own, 0.1), (50, own, 0.2), (32, more, 0.2), (25, more, 0.3))
    ]
    for name, counts in own_steps.items():
        for n in counts:
            choice = {"source": name, f"{name}.steps": n}
            both = name == "meanflow" and has_predictor
            found += (
                [choice | {"predictor": False}, choice | {"predictor": True, "full_share": 0.5}] if both else [choice]
            )
    return found


def suggest(trial: optuna.Trial, own_steps: dict[str, list[int]], has_predictor: bool) -> Preset:
    """The settings of a try: a method with its own noise levels in some steps, or a plain solver with caches."""
    source = trial.suggest_categorical("source", ("base", *own_steps))
    if source != "base":
        steps = trial.suggest_categorical(f"{source}.steps", own_steps[source])
        methods = {source: {"steps": steps}}
        if source == "meanflow" and has_predictor and trial.suggest_categorical("predictor", (False, True)):
            full = max(2, round(steps * trial.suggest_float("full_share", 0.3, 0.9, step=0.1)))
            methods["disca"] = {"num_full_steps": full}
        return Preset(methods=methods)
    steps = trial.suggest_categorical("steps", STEPS)
    solver = trial.suggest_categorical("solver", ("unipc", "dpm++2m", "dpm++2s", "euler"))
    methods = {}
    if steps >= 10 and trial.suggest_categorical("stepcache", (True, False)):
        methods["stepcache"] = _stepcache(trial)
    if steps >= 10 and trial.suggest_categorical("guidance", (True, False)):
        methods["fastercache"] = {
            "attention": False,
            "guidance_interval": trial.suggest_int("guidance_interval", 2, 8),
            "guidance_start": round(trial.suggest_float("guidance_start", 0.1, 0.8, step=0.05), 2),
        }
    return Preset(steps=steps, solver=solver, shift=trial.suggest_float("shift", *SHIFTS, step=0.5), methods=methods)


def _stepcache(trial: optuna.Trial) -> dict:
    schedule = trial.suggest_categorical("schedule", ("change", "spread"))
    if schedule == "change":
        return {"schedule": schedule, "threshold": round(trial.suggest_float("threshold", 0.02, 0.8, step=0.02), 2)}
    return {"schedule": schedule, "full_share": round(trial.suggest_float("spread_share", 0.1, 0.8, step=0.02), 2)}


class Judge:
    """Generates the videos of a preset and compares them with the baseline's, which are generated once."""

    def __init__(self, model: str, pipe, defaults: ModelDefaults, prompts: Sequence[str]):
        self.model, self.pipe, self.defaults, self.prompts = model, pipe, defaults, prompts
        self._baselines: dict[str, Video] = {}

    def __call__(self, preset: Preset) -> dict:
        """The row of a preset."""
        pairs = [Pair(self._baseline(prompt), self._generate(prompt, preset), prompt) for prompt in self.prompts]
        flops = [[video.trace.flops_computed_and_full()[0] for video in (p.video, p.baseline)] for p in pairs]
        work = sum(own / full for own, full in flops) / len(pairs)
        row = {"preset": preset.model_dump(exclude_defaults=True), "work": work, "speed": 1 / work}
        row["ssim"] = self._mean("ssim", pairs)
        of_baselines = [Pair(pair.baseline, pair.baseline, pair.prompt) for pair in pairs]
        if "adherence" in self.defaults.metrics and (read := self._mean("adherence", of_baselines)) is not None:
            row["adherence_loss"] = read - self._mean("adherence", pairs)
        return row

    def _mean(self, metric: str, pairs: Sequence[Pair]) -> float | None:
        """The mean over the pairs for which the metric is defined: adherence is for prompts of the toy world alone."""
        values = [value for pair in pairs if (value := mean_of(METRICS[metric].measure(pair))) is not None]
        return sum(values) / len(values) if values else None

    def _baseline(self, prompt: str) -> Video:
        if prompt not in self._baselines:
            self._baselines[prompt] = self._generate(prompt, Preset())
        return self._baselines[prompt]

    def _generate(self, prompt: str, preset: Preset) -> Video:
        return generate(self._run(prompt, preset), self.pipe, self.defaults)

    def _run(self, prompt: str, preset: Preset) -> Run:
        settings = preset.model_dump(exclude_defaults=True)
        return build_run(self.defaults, model=self.model, prompt=prompt, seed=0, **settings)


def front(rows: Sequence[dict]) -> list[dict]:
    """The rows that no other one beats in work and SSIM, slowest first; a preset that was tried twice is there once."""
    rows = list({json.dumps(row["preset"], sort_keys=True): row for row in rows}.values())
    return [rows[i] for i in pareto_front([(row["speed"], row["ssim"]) for row in rows])]


def fastest(rows: Sequence[dict], max_loss: float) -> dict:
    """`tuned_within`, but raises AccelError if no row is."""
    if row := tuned_within(rows, max_loss):
        return row
    least = min((1 - row["ssim"] for row in rows if keeps_adherence(row)), default=1)
    raise AccelError(
        f"no try loses at most {max_loss:g} of SSIM and {MAX_ADHERENCE_LOSS:g} of adherence; the least of those that "
        f"keep adherence is {least:.2g}: allow more, or try more --trials"
    )


def at_least(rows: Sequence[dict], speed: float) -> dict | None:
    """The row with the best SSIM among those of a speed or more; None if there is none."""
    return max((row for row in rows if is_as_fast(row["speed"], speed)), key=lambda row: row["ssim"], default=None)


def front_table(rows: dict[str, dict]) -> str:
    """A Markdown table of named rows."""
    settings = lambda row: yaml.safe_dump(row["preset"], default_flow_style=True, width=1000).strip()
    cells = [[name, f"{row['speed']:.2f}", f"{row['ssim']:.4f}", settings(row)] for name, row in rows.items()]
    return markdown(["preset", "less work", "SSIM", "settings"], cells)


def write_preset(row: dict, file: Path, prompts: int, trials: int) -> None:
    """Write a row as a preset that says how it was found."""
    measured = f"{row['speed']:.2f} times less work at SSIM {row['ssim']:.4f}"
    about = f"{measured}, the mean over {prompts} tuning prompts; found by accel tune among {trials} tries."
    with atomic_write(file) as part:
        part.write_text(yaml.safe_dump({"about": about, **row["preset"]}, sort_keys=False, width=1000))
