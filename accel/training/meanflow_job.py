"""Restricted MeanFlow as it is ordered: guidance first, then mean velocities; where the student goes."""

from __future__ import annotations

import json
import sys
import time
from functools import partial
from pathlib import Path

import torch
from accelerate import PartialState
from torch import nn

from ..runtime.models import home_of
from ..students.interval_embedding import IntervalEmbedder, unwrapped
from ..students.weights import bears, load_differences, marks
from .jobs import Order, begin, own_share, share_stages
from .loop import Recipe
from .rollouts import TimedGround
from .stages import distil, remaining, store, totals
from .tasks.meanflow_distillation import Course, MeanFlowTask, longest_step

FIRST = 2  # times the second stage's iterations in the first, at twice the rates: its error is the floor of all
ARMS: dict[str, dict] = {  # the method, and plain MeanFlow; R is the widest interval of the schedules if not given
    "meanflow": {},
    "even": {"follow": False},
    "exact": {"slope": "exact"},
    "unrestricted": {"longest": 1.0, "follow": False},
    "guided": {"source": "base"},  # so that the second stage goes on with what the first has not taken in
}
SECOND = ("longest", "follow", "slope", "source")  # what of a course its second stage alone heeds
STEPS = (20, 10)  # numbers of steps that the student is made for
HEAD_START = "gpd-N48"  # a student that took in guidance at one strength, if it is there


def train_meanflow(recipe: Recipe, order: Order, device: str, minutes: float | None, resume: bool, out: Path) -> dict:
    """Distil a model into a student that lies beside it, `meanflow`; a rival's lies in `out`.

    Raises ValueError for an order that cannot be carried out, or a resume of another order.
    """
    began, lines = time.monotonic(), order.lines(ARMS)
    pipe = order.pipeline(device)
    base = marks(pipe.transformer)
    task, start = _task(recipe, order, pipe, lines, device)
    recipes = stage_recipes(recipe)
    told = {"base": base, "course": task.course.model_dump(mode="json"), "start": start, **order.told(lines)}
    begin(out, resume, recipes, told)
    own = order.arm in (None, "meanflow")
    if not own:
        resume |= share_stages(order.sibling(out, "meanflow"), out, list(task.stages), _tells)
    target = order.beside() if own and order.beside() else out
    print(
        f"intervals up to R = {task.course.longest:.3f}; the student goes into {target / 'meanflow'}", file=sys.stderr
    )
    held, keep = order.held_out(task, pipe, lines), partial(_keep, task, {"base": base, "start": start}, out, target)
    return {
        "start": start,
        **totals(recipes, distil(task, held, recipes, out, keep, remaining(minutes, began), resume)),
    }


def _task(recipe: Recipe, order: Order, pipe, lines: list[str], device: str) -> tuple[MeanFlowTask, str | None]:
    """The task, and the student whose weights it starts with."""
    home = home_of(pipe, order.model)
    around = (max(1.0, 0.5 * home.guidance), 1.25 * home.guidance)
    given = {"longest": longest_step(pipe.scheduler, STEPS), "steps": STEPS, "guidance": around}
    course = Course(**given | {"slots": order.trajectories()} | ARMS[order.arm or "meanflow"])
    ground = TimedGround(**vars(order.ground(pipe, home, course.base_steps, lines)), guidance=home.guidance)
    transformer, beside = pipe.transformer, order.beside()
    start = HEAD_START if not order.adapters() and beside and has_head_start(beside, transformer) else None
    transformer.condition_embedder = IntervalEmbedder(transformer.condition_embedder)
    nets = order.networks(transformer, recipe.seed, device)
    if start:
        start_from(nets.module, transformer, beside / HEAD_START)
    return MeanFlowTask(recipe, course, nets, ground, own_share()), start


def has_head_start(beside: Path, transformer: nn.Module) -> bool:
    """Whether a student that took in guidance lies beside a model, and is of that model and not of an earlier one."""
    folder = beside / HEAD_START
    if not (folder / "model.safetensors").is_file():
        return False
    if bears(transformer, json.loads((folder / "gpd.json").read_text())["base"]):
        return True
    print(f"{folder} was made from another base: the first stage begins with this one", file=sys.stderr)
    return False


@torch.no_grad()
def start_from(module: nn.Module, base: nn.Module, folder: Path) -> None:
    """Give a student the weights of another one of its base; those that are zero in the base's time embedding stay."""
    with unwrapped(module), unwrapped(base):
        known = load_differences(base, folder / "model.safetensors")
        for (name, own), plain in zip(module.named_parameters(), base.parameters(), strict=True):
            own.copy_(known[name] * (plain != 0) if "time_embedder" in name else known[name])


def _tells(order: dict, stage: int) -> dict:
    """What of an order tells on a stage and on those before it."""
    course = {knob: value for knob, value in order["course"].items() if stage or knob not in SECOND}
    return {**order, "course": course, "recipes": order["recipes"][: stage + 1]}


def stage_recipes(recipe: Recipe) -> list[Recipe]:
    """A recipe for each stage."""
    fast = {"steps": FIRST * recipe.steps, "lr": 2 * recipe.lr, "matrix_lr": 2 * recipe.matrix_lr}
    return [recipe.model_copy(update=fast), recipe]


def _keep(task: MeanFlowTask, told: dict, out: Path, target: Path, facts: dict) -> None:
    """Store a stage's student: the last one as the result, the first one for comparison."""
    if not PartialState().is_main_process:
        return
    course = task.course
    folder = out / "guidance-only" if task.stage == 0 else target / "meanflow"
    about = {**told, "guidance": course.guidance, "usual": task.ground.guidance, "longest": course.longest,
             "instant": task.ground.instant, "held_out": facts}  # fmt: skip
    store(
        task.nets, folder, "meanflow.json", about | {"course": course.model_dump(), "recipe": task.recipe.model_dump()}
    )
