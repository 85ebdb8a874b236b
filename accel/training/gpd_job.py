"""GPD as it is ordered: stage after stage, or a rival of equal compute; where its students go."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from accelerate import PartialState

from ..ops.spectrum import high_pass
from ..runtime.models import home_of
from ..students.weights import marks
from .jobs import Order, begin, own_share, share_stages
from .loop import Recipe
from .stages import distil, remaining, store, totals
from .tasks.gpd_distillation import PIECES, Curriculum, GpdTask

LAST = 8  # horizon of the last student
FIRST = 32  # times a stage's iterations in the first one, at twice the rates: taking in guidance is the largest error
TRAINED = 3  # forward passes that a forward and a backward pass together cost
ARMS: dict[str, Callable[[float], dict]] = {  # GPD and its rivals: the curriculum at the model's own guidance
    "gpd": lambda w: {"space": 0.3, "time": 0.3},
    "no-constraint": lambda w: {},
    "annealed": lambda w: {"guidance_start": 1.5 * w, "guidance_end": max(1.0, 0.375 * w), "guidance_anneal": "stage",
                           "space": 0.3, "time": 0.3},
    "halving": lambda w: {"way": "halving", "horizons": (1, 2, 4, LAST)},
    "direct": lambda w: {"way": "direct", "horizons": (LAST,)},
    "guidance-only": lambda w: {"horizons": (1,)},
}  # fmt: skip


def train_gpd(recipe: Recipe, order: Order, device: str, minutes: float | None, resume: bool, out: Path) -> dict:
    """Distil a model into students; GPD's lie beside a local model, `gpd-N48` to `gpd-N6`, a rival's in `out`.

    Raises ValueError for an order that cannot be carried out, or a resume of another order.
    """
    began, lines = time.monotonic(), order.lines(ARMS)
    pipe = order.pipeline(device)
    task = _task(recipe, order, pipe, lines, device)
    recipes, base = stage_recipes(recipe, task.curriculum), marks(pipe.transformer)
    told = {"base": base, "curriculum": task.curriculum.model_dump(mode="json"), **order.told(lines)}
    begin(out, resume, recipes, told)
    own = order.arm in (None, "gpd")
    if not own:
        resume |= share_stages(order.sibling(out, "gpd"), out, list(task.stages), _tells)
    target = order.beside() if own and order.beside() else out
    print(f"students go into {target}", file=sys.stderr)
    if task.curriculum.space or task.curriculum.time:
        print(f"the last stage weighs {masked(task.ground.shape)}", file=sys.stderr)
    about = {"base": base, "shift": shift_of(pipe.scheduler)}
    held, keep = order.held_out(task, pipe, lines), partial(_keep, task, about, target)
    return totals(recipes, distil(task, held, recipes, out, keep, remaining(minutes, began), resume))


def _task(recipe: Recipe, order: Order, pipe, lines: list[str], device: str) -> GpdTask:
    home = home_of(pipe, order.model)
    own = {"guidance_start": home.guidance, "guidance_end": home.guidance, "slots": order.trajectories()}
    curriculum = Curriculum(**own | ARMS[order.arm or "gpd"](home.guidance))
    ground = order.ground(pipe, home, curriculum.base_steps, lines)
    nets = order.networks(pipe.transformer, recipe.seed, device)
    return GpdTask(recipe, curriculum, nets, ground, own_share())


def _keep(task: GpdTask, about: dict, target: Path, facts: dict) -> None:
    """Store a stage's student, if its horizon divides the base steps."""
    curriculum, ground, k = task.curriculum, task.ground, task.horizon
    if curriculum.base_steps % k or not PartialState().is_main_process:
        return
    far = k if len(curriculum.horizons) > 1 else LAST  # a single stage is there to be run in six steps
    steps = curriculum.base_steps // far
    grid = {"levels": ground.levels[::far].tolist(), "times": ground.times[::far].tolist()}
    told = {"steps": steps, "horizon": k, "guidance": 1.0, **grid, **about, "held_out": facts}
    made = {"curriculum": curriculum.model_dump(), "recipe": task.recipe.model_dump()}
    store(task.nets, target / f"gpd-N{steps}", "gpd.json", told | made)


def _tells(order: dict, stage: int) -> dict:
    """What of an order tells on a stage and on those before it: weights of frequencies on the last one alone."""
    curriculum = order["curriculum"]
    horizons, last = curriculum["horizons"][: stage + 1], stage + 1 == len(curriculum["horizons"])
    silent = {*(() if last else ("space", "time")), *(("way",) if horizons == [1] else ())}
    told = {knob: value for knob, value in curriculum.items() if knob not in silent}
    told |= {"horizons": horizons, "last": last}
    return {**order, "curriculum": told, "recipes": order["recipes"][: stage + 1]}


def shift_of(scheduler) -> float | None:
    """How far a scheduler shifts its levels towards noise, where it is told a number."""
    config = scheduler.config
    return config.get("flow_shift", config.get("shift"))


def masked(shape: tuple[int, ...]) -> str:
    """Which frequencies of latents (c, f, h, w) the constraint takes for high ones: a # for each that counts."""
    spatial, temporal = (mask.int() for mask in high_pass(shape[1:]))
    draw = lambda line: "".join(".#"[on] for on in line.tolist())
    return f"temporal frequencies {draw(temporal[:, 0, 0])}, spatial ones {' '.join(map(draw, spatial[0]))}"


def cost(curriculum: Curriculum, k: int) -> int:
    """Forward passes that an iteration of horizon k costs: the pieces of its target, and the student's own."""
    return sum(2 if who == "teacher" else 1 for who, _ in PIECES[curriculum.way](k)) + TRAINED


def stage_recipes(recipe: Recipe, curriculum: Curriculum) -> list[Recipe]:
    """A recipe for each stage, so that every curriculum costs as many forward passes as GPD's own."""
    own, fast = Curriculum(), {"lr": 2 * recipe.lr, "matrix_lr": 2 * recipe.matrix_lr}
    whole = recipe.steps * (FIRST * cost(own, 1) + sum(cost(own, k) for k in own.horizons[1:]))
    begins = curriculum.horizons[0] == 1 and len(curriculum.horizons) > 1
    first = [recipe.model_copy(update={"steps": FIRST * recipe.steps, **fast})] if begins else []
    rest = curriculum.horizons[len(first) :]
    left = whole - sum(r.steps * cost(curriculum, 1) for r in first)
    each = {"steps": round(left / sum(cost(curriculum, k) for k in rest)), **({} if begins else fast)}
    return [*first, *[recipe.model_copy(update=each)] * len(rest)]
