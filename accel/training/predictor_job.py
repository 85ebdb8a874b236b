"""DisCa's predictor as it is ordered: of which student, in which form; where it goes."""

from __future__ import annotations

import json
import sys
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import get_args

import torch
from accelerate import PartialState
from safetensors.torch import load_file

from ..families import family_of
from ..methods.disca.disca import spread
from ..methods.disca.predictor import Form, Predictor
from ..runtime.generate import build_run, grid
from ..runtime.models import home_of
from ..students.interval_embedding import TOLD, conditioned
from ..students.loading import placed
from ..students.manifest import check_base
from ..students.weights import marks
from .feature_probe import Watched
from .jobs import Order, begin, own_share
from .loop import Recipe
from .optimize import quicken
from .rollouts import TimedGround
from .stages import distil, remaining, store, totals
from .tasks.predictor_fit import Lessons, PredictorTask
from .validation import HeldOutWays

ARMS = get_args(Form)
DEPTH = 1  # blocks: one is an eighth of the shipped model, two would be a quarter; the paper's two are under 4 %
SHARPEN = 3  # how many times fewer iterations the second stage has, at half the rates
FULL = 8  # whole passes, of the steps, that it is looked at with


def train_predictor(recipe: Recipe, order: Order, device: str, minutes: float | None, resume: bool, out: Path) -> dict:
    """Train a predictor for the MeanFlow student beside a model; it lies there too, in `predictor/` by its form.

    Raises ValueError for an order that cannot be carried out, or a resume of another order.
    """
    began, lines = time.monotonic(), order.lines(ARMS)
    if order.rank is not None:
        raise ValueError("a predictor is small and learns whole: leave --rank out")
    pipe, form = order.pipeline(device), order.arm or ARMS[0]
    folder = (order.beside() or order.sibling(out, "meanflow")) / "meanflow"
    if not (folder / "meanflow.json").is_file():
        raise ValueError("the student comes first: python -m accel train meanflow")
    facts = json.loads((folder / "meanflow.json").read_text())
    check_base(folder, facts["base"], pipe)
    with ExitStack() as stack:
        stack.enter_context(placed(folder, pipe.transformer))
        stack.enter_context(conditioned(pipe.transformer, load_file(folder / TOLD)))
        student = marks(pipe.transformer)
        stack.callback(setattr, pipe.transformer, "blocks", pipe.transformer.blocks)
        task = _task(recipe, order, pipe, facts, lines, form, device)
        recipes = stage_recipes(recipe)
        told = {"student": student, "lessons": task.lessons.model_dump(mode="json"), "form": form, **order.told(lines)}
        begin(out, resume, recipes, told)
        target = (order.beside() or out) / "predictor" / form
        print(f"the predictor goes into {target}", file=sys.stderr)
        held = HeldOutWays(task, order.looks(lines), spread(FULL, task.lessons.steps))
        keep = partial(_keep, task, {"form": form, "depth": DEPTH, "student": student}, out, target)
        return totals(recipes, distil(task, held, recipes, out, keep, remaining(minutes, began), resume))


def _task(recipe: Recipe, order: Order, pipe, facts: dict, lines: list[str], form: str, device: str) -> PredictorTask:
    home = home_of(pipe, order.model)
    lessons = Lessons(guidance=facts["guidance"], slots=order.trajectories())
    ground = TimedGround(**vars(order.ground(pipe, home, lessons.steps, lines)), guidance=facts["usual"])
    tokens, family = grid(pipe, build_run(home, model="", prompt="-")), family_of(pipe)
    torch.manual_seed(recipe.seed)
    predictor = Predictor(family, pipe.transformer, form, DEPTH)
    if order.toy():
        for blocks in (pipe.transformer.blocks, predictor.blocks):
            quicken(blocks, device)
    student = Watched(pipe.transformer, spare=not order.toy())
    return PredictorTask(recipe, lessons, student, predictor, ground, tokens, own_share())


def stage_recipes(recipe: Recipe) -> list[Recipe]:
    """A recipe for each stage."""
    fine = {"steps": max(1, recipe.steps // SHARPEN), "lr": recipe.lr / 2, "matrix_lr": recipe.matrix_lr / 2}
    return [recipe, recipe.model_copy(update=fine)]


def _keep(task: PredictorTask, told: dict, out: Path, target: Path, facts: dict) -> None:
    """Store the predictor after a stage: the last one as the result, the first one for comparison."""
    if not PartialState().is_main_process:
        return
    target = target if task.stage else out / "match-only"
    name, before = list(task.stages)[task.stage], out / "match" / "done.json"
    stages = {"match": json.loads(before.read_text())} if task.stage else {}
    about = told | {"stages": {**stages, name: facts}, "lessons": task.lessons.model_dump()}
    store(task, target, "predictor.json", about | {"recipe": task.recipe.model_dump()})
