"""The suites: which settings are measured together, and which of them are compared in pairs.

To add a suite, add an entry to `SUITES`. Its first setting is the baseline that all others are compared with.
Students of ablations lie in `checkpoints/`, where `python -m accel train ... --ablation NAME` leaves them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import get_args

from ..errors import AccelError
from ..methods import METHODS
from ..runtime.models import resolve
from ..runtime.paths import ROOT
from ..runtime.presets import RUN_SETTINGS, Preset, build_methods, load_preset

RESULTS = ROOT / "docs" / "results"
SAME_TIME = 0.9  # a baseline is as fast as a preset if it reaches this share of its speed-up
PROMPT_SEED = 2026  # of the held-out prompts that figures are reported on; settings are chosen on others
TUNING_SEED = 11  # of those that settings are searched and chosen on

FRONT = "front"  # the suite that the first tables come from
OVERVIEW = {  # preset -> its setting in the front, where all of them are measured
    "baseline": "baseline",
    "balanced": "fittedsolver, 20 steps",
    "quick": "fittedsolver, 10 steps",
    "stepcache": "stepcache 0.2, 50 steps",
    "fastercache": "fastercache, 50 steps",
    "asymrnr": "asymrnr, 50 steps",
    "combined": "combined",
    "meanflow": "meanflow, 20 steps",
    "disca": "disca, 8 of 20 steps",
    "gpd": "gpd, 6 steps",
    "turbo": "disca, 5 of 10 steps",
}


@dataclass(frozen=True)
class Setting:
    """A preset (None: no method), run settings in place of its own or the model's, and parameters of its methods."""

    preset: str | None = None
    steps: int | None = None
    guidance: float | None = None
    solver: str | None = None
    shift: float | None = None
    noise: float = 0.0  # the share of other noise in the initial one
    overrides: dict[str, dict] = field(default_factory=dict)

    def settings(self) -> dict:
        """Arguments of `build_run`; None means the model's own value."""
        preset = load_preset(self.preset) if self.preset else Preset()
        names = dict.fromkeys((*preset.methods, *self.overrides))
        methods = {name: {**preset.methods.get(name, {}), **self.overrides.get(name, {})} for name in names}
        run = {name: getattr(self, name) for name in RUN_SETTINGS}
        return {
            "methods": methods,
            **{name: getattr(preset, name) if value is None else value for name, value in run.items()},
        }

    def is_available(self, model: str) -> bool:
        """Whether all that its methods load exists for a model."""
        return all(method.is_available(resolve(model)) for method in build_methods(self.settings()["methods"]))


@dataclass(frozen=True)
class Suite:
    """Settings by name, the baseline first, and pairs (a, b) of them whose difference a - b is reported.

    Where `groups` name settings, the best of each group at each speed are chosen on other prompts, and only these and
    those of `pairs` are measured (see front.py).
    """

    settings: dict[str, Setting]
    pairs: tuple[tuple[str, str], ...] = ()
    groups: dict[str, tuple[str, ...]] = field(default_factory=dict)


BASELINE = {"baseline": Setting()}
NOISE_FLOOR = "baseline, 1 % other noise"  # how far videos differ that nobody would call worse
NEUTRAL = "neutral methods"  # given, but left out of the model, as they would change nothing
BASELINE_48 = {"baseline, 48 steps": Setting(steps=48)}  # 48 is a multiple of every step count of GPD


def fewer_steps(*counts: int) -> dict[str, Setting]:
    """The baseline at other step counts."""
    return {f"baseline, {n} steps": Setting(steps=n) for n in counts}


def against(a: str, *others: str) -> tuple[tuple[str, str], ...]:
    """Pairs of one setting with each of the others."""
    return tuple((a, b) for b in others)


def _asymrnr(**parameters) -> Setting:
    return Setting("asymrnr", overrides={"asymrnr": parameters})


def _asymrnr_suite() -> Suite:
    ablations = {
        "asymrnr, schedule by similarity": _asymrnr(schedule="similarity"),
        "asymrnr, averaged and weighted by size": _asymrnr(merge="values", bias=True),
        "asymrnr, correction from the last residual": _asymrnr(correction="last"),
        "asymrnr, no correction": _asymrnr(
            correction="none", budget=0.75, start=0.3, matching="global", merge="values", bias=True
        ),
    }
    peers = {name: Setting(name) for name in ("asymrnr-official", "tome", "todo")}
    others = peers | ablations | fewer_steps(38)
    return Suite(BASELINE | {"asymrnr": Setting("asymrnr")} | others, against("asymrnr", *others))


def _gpd_ablations(*names: str) -> Suite:
    ablations = {name: Setting("gpd", overrides={"gpd": {"student": f"checkpoints/{name}/gpd-N6"}}) for name in names}
    return Suite(BASELINE_48 | {"gpd": Setting("gpd")} | ablations, against("gpd", *names))


def _meanflow(**ablations: str) -> Suite:
    """The shipped student, the one it starts from, and students of ablations {name: folder}, at 20 and 10 steps."""
    students = {"meanflow": "", "guidance distilled": "checkpoints/meanflow/guidance-only", **ablations}
    rows = {
        f"{name}, {n} steps": Setting("meanflow", overrides={"meanflow": {"steps": n, "student": folder}})
        for name, folder in students.items()
        for n in (20, 10)
    }
    others = [name for name in students if name != "meanflow"]
    pairs = tuple((f"meanflow, {n} steps", f"{name}, {n} steps") for n in (20, 10) for name in others)
    return Suite(BASELINE | rows | fewer_steps(20, 10, 5), pairs + (("meanflow, 20 steps", "baseline, 10 steps"),))


def _disca() -> Suite:
    regression = "checkpoints/predictor/regression-only"
    variants = {
        "disca, predictor of the paper": Setting("disca", overrides={"disca": {"predictor": "paper"}}),
        "disca, regression stage alone": Setting("disca", overrides={"disca": {"predictor_dir": regression}}),
    } | {
        f"{form} at the same full steps": Setting("disca", overrides={"disca": {"predictor": form}})
        for form in ("reuse", "taylor-1", "taylor-2")
    }
    students = _meanflow_steps(20, 12, 10, 8, 6)
    baselines = fewer_steps(6, 5) | {"Euler, 5 steps": Setting(steps=5, solver="euler")}
    settings = BASELINE | {"disca": Setting("disca")} | variants | students | baselines | {"turbo": Setting("turbo")}
    pairs = against("disca", *variants, "meanflow, 10 steps", "Euler, 5 steps", "baseline, 5 steps")
    return Suite(settings, pairs + (("turbo", "meanflow, 6 steps"),))


def _disca_base() -> Suite:
    """DisCa on the base model itself: its predictor, and what needs none, at the same number of full steps."""
    settings, pairs = {}, ()
    for full in (16, 8):
        forms = {
            f"{form}, {full} of 50 steps": Setting(overrides={"disca": {"num_full_steps": full, "predictor": form}})
            for form in ("guided-base", "reuse", "taylor-1")
        }
        share = {"schedule": "spread", "full_share": full / 50}
        forms[f"stepcache, {full} of 50 steps"] = Setting(overrides={"stepcache": share})
        first, *others = forms
        settings, pairs = settings | forms, pairs + against(first, *others)
    return Suite(BASELINE | settings, pairs)


def _front() -> Suite:
    groups = {"ours": _training_free() | _students(), "peers": _peers(), "plain solvers": _plain_solvers()}
    neutral = {name: method.neutral for name, method in METHODS.items() if method.neutral and not method.peer}
    settings = BASELINE | {NEUTRAL: Setting(overrides=neutral), NOISE_FLOOR: Setting(noise=0.01)}
    for found in groups.values():
        settings |= found
    pairs = (  # of about equal speed, which the classes do not pair
        ("stepcache 0.22, 50 steps", "seacache 0.15, 30 steps, shift 4"),
        ("stepcache 0.2, 50 steps", "fittedsolver, 20 steps"),
        ("fastercache, 50 steps", "unipc, shift 5, 25 steps"),
        ("disca, 8 of 20 steps", "euler, shift 5, 5 steps"),
        ("disca, 8 of 20 steps", "meanflow, 20 steps"),
    )
    return Suite(settings, pairs, {group: tuple(found) for group, found in groups.items()})


def _in_steps(counts: Sequence[int], settings: dict[str, Setting]) -> dict[str, Setting]:
    """Each setting at each step count."""
    return {f"{name}, {n} steps": replace(setting, steps=n) for name, setting in settings.items() for n in counts}


def _training_free() -> dict[str, Setting]:
    caches = {name: Setting(name) for name in ("fastercache", "asymrnr")}
    stack = {"reuse": "stack", "extrapolation": "logsnr"}
    caches["fastercache, stack"] = Setting("fastercache", overrides={"fastercache": stack})
    found = _in_steps((50, 25), caches) | {"combined": Setting("combined")}
    for value in (0.1, 0.15, 0.2, 0.22, 0.3, 0.45, 0.6):
        found[f"stepcache {value}, 50 steps"] = _stepcache(value, steps=50)
    fewer = {
        (30, 4.0): (0.15, 0.2, 0.3),
        (25, 4.0): (0.2, 0.3, 0.45),
        (20, 5.0): (0.3, 0.45, 0.6),
        (16, 5.0): (0.45, 0.6),
    }
    for (steps, shift), thresholds in fewer.items():
        for value in thresholds:  # as SeaCache among the peers
            found[f"stepcache {value}, {steps} steps, shift {shift:g}"] = _stepcache(value, steps=steps, shift=shift)
    return found | _fitted_steps(*get_args(METHODS["fittedsolver"].model_fields["steps"].annotation)[1:])


def _stepcache(threshold: float, **run) -> Setting:
    return Setting("stepcache", **run, overrides={"stepcache": {"threshold": threshold}})


def _students() -> dict[str, Setting]:
    found = _gpd_steps(24, 16, 12, 8, 6) | _meanflow_steps(20, 12, 10, 8, 6, 5, 4)
    for full, n in ((12, 20), (8, 20), (5, 20), (5, 10), (4, 6)):
        overrides = {"meanflow": {"steps": n}, "disca": {"num_full_steps": full}}
        found[f"disca, {full} of {n} steps"] = Setting("disca", overrides=overrides)
    return found


def _fitted_steps(*counts: int) -> dict[str, Setting]:
    return {f"fittedsolver, {n} steps": Setting(overrides={"fittedsolver": {"steps": n}}) for n in counts}


def _gpd_steps(*counts: int) -> dict[str, Setting]:
    return {f"gpd, {n} steps": Setting("gpd", overrides={"gpd": {"steps": n}}) for n in counts}


def _meanflow_steps(*counts: int) -> dict[str, Setting]:
    return {f"meanflow, {n} steps": Setting("meanflow", overrides={"meanflow": {"steps": n}}) for n in counts}


def _peers() -> dict[str, Setting]:
    """diffusers' caches at half of the default, the default and twice the default of what makes each faster.

    SeaCache also on fewer steps with a larger shift, which nobody offers as such: on the tuning prompts it is the best
    peer from 2.5 times the speed on, at a larger threshold where there are fewer steps.
    """
    found = {}
    few, some, many = (0.1, 0.2, 0.3, 0.5), (0.2, 0.3, 0.5, 0.7), (0.3, 0.5, 0.7, 1.0)
    fewer = (0.1, 0.15, *few[1:])
    runs = {(50, 3.0): few, (30, 4.0): fewer, (25, 4.0): fewer, (20, 5.0): some, (16, 5.0): some, (12, 5.0): many}
    for (steps, shift), thresholds in (runs | {(10, 5.0): many}).items():
        for threshold in thresholds:
            name = f"seacache {threshold}, {steps} steps, shift {shift:g}"
            found[name] = Setting(steps=steps, shift=shift, overrides={"seacache": {"threshold": threshold}})
    series = {
        f"dbcache, Taylor, residual_diff_threshold {value}": Setting(
            overrides={"dbcache": {"taylorseer_order": 1, "residual_diff_threshold": value}}
        )
        for value in (0.08, 0.16, 0.24)
    }
    return found | _in_steps((50,), _around_the_defaults(but="seacache") | series)


def _around_the_defaults(but: str) -> dict[str, Setting]:
    found = {}
    for name, method in METHODS.items():
        if name == but:
            continue
        for parameter in method.basic[:1] if method.peer else ():
            schema = method.parameters()[parameter]
            unit, default = schema.get("multipleOf", 1), schema["default"]
            for value in (round(round(default * times / unit) * unit, 6) for times in (0.5, 1, 2)):
                if value > schema["minimum"]:
                    found[f"{name}, {parameter} {value}"] = Setting(overrides={name: {parameter: value}})
    return found


def _plain_solvers() -> dict[str, Setting]:
    """The base model in the steps of each speed class; DPM++ of order 1 is Euler on these noise levels."""
    solvers = {
        f"{solver}, shift {shift:g}": Setting(solver=solver, shift=shift)
        for solver, shift in (("unipc", 3.0), ("unipc", 5.0), ("euler", 5.0), ("dpm++2m", 5.0), ("dpm++2s", 5.0))
    }
    multistep = {name: setting for name, setting in solvers.items() if setting.solver == "unipc"}
    # a history of outputs is of use in many steps
    return _in_steps((33, 25, 20), multistep) | _in_steps((14, 10, 6, 5, 4, 3), solvers)


def _base() -> Suite:
    """Whether the base model draws what is asked, needs its steps, and is nearer to its students than to plain solvers.

    On many prompts, so of few settings: at each step count the plain solver that is best on the tuning prompts.
    """
    solvers = _plain_solvers()
    best = (
        "unipc, shift 5, 25 steps",
        *(f"dpm++2s, shift 5, {n} steps" for n in (10, 6, 3)),
        "euler, shift 5, 5 steps",
    )
    plain = {name: solvers[name] for name in best}
    euler = Setting(solver="euler", shift=5.0, guidance=1.0)
    plain |= _in_steps((10, 6), {"euler, shift 5, no guidance": euler})
    pairs = (
        *against("meanflow, 10 steps", "euler, shift 5, 5 steps", "euler, shift 5, no guidance, 10 steps"),
        *against("gpd, 6 steps", "dpm++2s, shift 5, 3 steps", "euler, shift 5, no guidance, 6 steps"),
    )
    return Suite(BASELINE | plain | _meanflow_steps(10) | _gpd_steps(6), pairs)


def _steps() -> Suite:
    """How many steps the base model needs: by the plain solvers that are best in few, by fitted ones, by its students.

    Guided steps cost two calls, so that of the solvers half as many have a student's NFE, or as many without guidance.
    """
    plain = {"default, 25 steps": Setting(steps=25)}
    plain |= _in_steps((14, 10, 6, 5, 3), {"euler, shift 5": Setting(solver="euler", shift=5.0)})
    plain |= _in_steps((10, 6, 5, 3), {"dpm++2s, shift 5": Setting(solver="dpm++2s", shift=5.0)})
    plain |= _in_steps((10, 6), {"euler, shift 7": Setting(solver="euler", shift=7.0)})
    plain |= _in_steps((10, 6), {"euler, shift 5, no guidance": Setting(solver="euler", shift=5.0, guidance=1.0)})
    pairs = tuple(
        (f"{student}, {nfe} steps", f"{solver}, {n} steps")
        for student, nfe in (("meanflow", 10), ("gpd", 6))
        for solver, n in (
            ("euler, shift 5", nfe // 2),
            ("dpm++2s, shift 5", nfe // 2),
            ("euler, shift 5, no guidance", nfe),
        )
    )
    pairs += tuple((f"fittedsolver, {n} steps", f"euler, shift 5, {n} steps") for n in (14, 10))
    pairs += against("fittedsolver, 10 steps", "euler, shift 7, 10 steps", "dpm++2s, shift 5, 10 steps")
    pairs += (("fittedsolver, 20 steps", "default, 25 steps"),)
    few = _gpd_steps(24, 16, 12, 8, 6) | _meanflow_steps(20, 10, 8, 6, 4)
    return Suite(BASELINE | plain | _fitted_steps(20, 14, 10) | few, pairs)


def _peer_defaults() -> Suite:
    """Each peer at its own defaults, and our settings of about the same work."""
    peers = {name: Setting(overrides={name: {}}) for name, method in METHODS.items() if method.peer}
    ours = _fitted_steps(20, 14)
    return Suite(BASELINE | peers | ours)


def _papers() -> Suite:
    """Each paper's method by its preset, and plain solvers of about the same work."""
    presets = {name: Setting(name) for name in ("fastercache", "asymrnr-official", "gpd", "meanflow", "disca")}
    plain = _in_steps((33, 10, 6, 3), {"unipc, shift 5": Setting(solver="unipc", shift=5.0)})
    return Suite(BASELINE | presets | plain)


SUITES: dict[str, Suite] = {
    FRONT: _front(),
    "peers": _peer_defaults(),
    "paper": _papers(),
    "base": _base(),
    "steps": _steps(),
    "asymrnr": _asymrnr_suite(),
    "gpd-ablations": _gpd_ablations("halving", "direct"),  # other ways from 48 steps to 6
    "gpd-guidance": _gpd_ablations("annealed", "guidance-only", "no-constraint"),  # other ways to distil the guidance
    "meanflow-ablations": _meanflow(
        **{
            "even intervals": "checkpoints/even/meanflow",
            "unrestricted (R = 1)": "checkpoints/unrestricted/meanflow",
            "mean velocities of the base": "checkpoints/guided/meanflow",
        }
    ),
    "disca": _disca(),
    "disca-base": _disca_base(),
}


def check_suite(suite: str) -> None:
    """Raise AccelError for an unknown suite."""
    if suite not in SUITES:
        raise AccelError(f"unknown suite {suite!r}; there are {', '.join(SUITES)}")


def results(suite: str) -> dict | None:
    """The committed results of a suite, if it was measured."""
    file = RESULTS / suite / "results.json"
    return json.loads(file.read_text()) if file.is_file() else None


def tuned(model: str) -> dict | None:
    """The committed search of `accel tune` for a model, if there is one: its "rows" and "prompts"."""
    file = RESULTS / "tune" / "front.json"
    search = json.loads(file.read_text()) if file.is_file() else {}
    return search if search.get("model") == model else None


def preset_rows(found: dict | None) -> dict[str, dict]:
    """The rows of the presets that were measured, of the results of the front if there are any."""
    rows = found["rows"] if found else {}
    return {preset: rows[setting] for preset, setting in OVERVIEW.items() if setting in rows}


def baseline_at_matched_time(found: dict, row: dict) -> str:
    """SSIM, name and speed-up of the baseline of the front with the highest SSIM that is as fast as a setting.

    If none is, the fastest one: a faster one would be worse still.
    """
    names = [n for n in list(found["rows"])[1:] if n in SUITES[FRONT].settings]  # the first is the reference
    plain = lambda setting: not setting.noise and not setting.settings()["methods"]
    baselines = {n: found["rows"][n] for n in names if plain(SUITES[FRONT].settings[n])}
    if not baselines or row is found["rows"][next(iter(found["rows"]))]:
        return "-"
    fast = {n: r for n, r in baselines.items() if r["speedup"] >= SAME_TIME * row["speedup"]}
    name = (
        max(fast, key=lambda n: fast[n]["ssim"][0]) if fast else max(baselines, key=lambda n: baselines[n]["speedup"])
    )
    best = baselines[name]
    return f"{best['ssim'][0]:.4f} ({name}, {best['speedup']:.2f}x)"
