"""What a sweep on the page will do: its settings from the widgets, checked before anything runs, and what they take."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from accel.evaluation.sweep import Axis, Cell, check_available, expand, parse_steps, with_student
from accel.runtime.models import ModelDefaults, read_defaults
from accel.runtime.run import Run, build_run

if TYPE_CHECKING:
    from accel.runtime.estimate import Estimate


@dataclass(frozen=True)
class Plan:
    """A checked sweep. `common`: model and prompt of all runs; `reference`: settings of the reference but its seed."""

    common: dict[str, Any]
    reference: dict[str, Any]
    axes: tuple[Axis, ...]
    cells: tuple[Cell, ...]

    def runs(self, cell: Cell, defaults: ModelDefaults) -> tuple[Run, Run]:
        """The reference and the run of a cell. Raises AccelError if a setting is not possible."""
        reference = {**with_student(self.reference), "seed": cell.settings["seed"]}
        return build_run(defaults, **self.common, **reference), build_run(defaults, **self.common, **cell.settings)


def make_plan(run: dict[str, Any], reference: dict, base: dict, axes: Sequence[Axis], plain_steps: str) -> Plan:
    """The sweep of `axes` around `base`. Raises AccelError for the first thing that is not possible.

    `run`: model, prompt and seed; `reference` and `base`: settings of a side; `plain_steps`: steps as text, or empty.
    """
    common = {key: run[key] for key in ("model", "prompt")}
    seed = {"seed": run["seed"]}
    cells = tuple(expand({**base, **seed}, axes, {**reference, **seed}, parse_steps(plain_steps)))
    plan = Plan(common, reference, tuple(axes), cells)
    defaults = read_defaults(run["model"]) or ModelDefaults()
    for cell in cells:
        plan.runs(cell, defaults)
        check_available(cell, run["model"])
    return plan


def plan_words(plan: Plan, estimate: Callable[[Run], Estimate] | None = None) -> str:
    """How many results a sweep has and, as far as `estimate` tells, how long it takes."""
    defaults = read_defaults(plan.common["model"]) or ModelDefaults()
    pairs = [plan.runs(cell, defaults) for cell in plan.cells]
    runs = [*{a.model_dump_json(): a for a, _ in pairs}.values(), *(b for _, b in pairs)]
    what = "1 result and its reference" if len(plan.cells) == 1 else f"{len(plan.cells)} results and their reference"
    text = f"{what}: {sum(run.steps for run in runs)} steps"
    estimates = [estimate(run) for run in runs] if estimate else []
    if not estimates or any(each.seconds is None for each in estimates):
        return f"{text}."
    bound = "at most about" if any(each.at_most for each in estimates) else "about"
    return f"{text}, {bound} {duration(sum(each.seconds for each in estimates))} of denoising."


def duration(seconds: float) -> str:
    """A duration in words, as "45 s" or "3 min"."""
    return f"{max(1, round(seconds))} s" if seconds < 100 else f"{round(seconds / 60)} min"
