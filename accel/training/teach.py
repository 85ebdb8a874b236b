"""Which distillation: of which model, for which prompts, by GPD or by a rival of equal compute."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from accelerate import PartialState

from ..models import TINY, home_of, load_pipeline, own_home, resolve
from ..weights import marks
from ..world.scene import caption, held_out_prompts, sample_scene
from .distil import HeldOut, distil, store
from .fit import Recipe
from .gpd import PIECES, Curriculum, GpdTask, ground_of
from .students import Copies

LAST = 8  # horizon of the last student
FIRST = 12  # times a stage's iterations in the first one, at twice the rates: taking in guidance is the largest error
TRAINED = 3  # forward passes that a forward and a backward pass together cost
LOOKS, HELD = 8, 2  # held-out prompts that are looked at: of the toy world, the last of a file
PROMPT_SEED = 11  # of the former; figures are reported on others
ARMS: dict[str, Callable[[float], dict]] = {  # GPD and its rivals: the curriculum at the model's own guidance
    "gpd": lambda w: {"space": 0.3, "time": 0.3},
    "no-constraint": lambda w: {},
    "annealed": lambda w: {"guidance_start": 1.5 * w, "guidance_end": max(1.0, 0.375 * w), "guidance_anneal": "stage",
                           "space": 0.3, "time": 0.3},
    "halving": lambda w: {"way": "halving", "horizons": (1, 2, 4, LAST)},
    "direct": lambda w: {"way": "direct", "horizons": (LAST,)},
    "guidance-only": lambda w: {"horizons": (1,)},
}  # fmt: skip


@dataclass(frozen=True)
class Order:
    """What is asked for. The toy world's own model needs neither prompts (a file of one a line) nor adapters."""

    model: str = TINY
    arm: str = "gpd"
    prompts: Path | None = None
    rank: int = 64
    slots: int | None = None  # trajectories under way; 16, or with adapters one for each process

    def adapters(self) -> bool:
        """Whether the students are adapters: they are for every model but the toy world's."""
        home = own_home(self.model)
        return home is None or not home.captions

    def lines(self) -> list[str]:
        """The prompts of the file. Raises ValueError for an order that cannot be carried out."""
        if self.arm not in ARMS:
            raise ValueError(f"unknown arm {self.arm!r}; there are {', '.join(ARMS)}")
        if not self.adapters():
            if self.prompts:
                raise ValueError("this model is trained on captions of its own world: leave --prompts out")
            return []
        if self.prompts is None or not self.prompts.is_file():
            raise ValueError("this model needs prompts to train on: give --prompts FILE, a text file of one a line")
        lines = [line.strip() for line in self.prompts.read_text().splitlines() if line.strip()]
        if len(lines) <= HELD:
            raise ValueError(
                f"{self.prompts} has {len(lines)} prompts: {HELD + 1} are needed, {HELD} of them to look at"
            )
        return lines


def train_gpd(recipe: Recipe, order: Order, device: str, minutes: float | None, resume: bool, out: Path) -> dict:
    """Distil a model into students; GPD's lie beside a local model, `gpd-N48` to `gpd-N6`, a rival's in `out`.

    Raises ValueError for an order that cannot be carried out, or a resume of another order.
    """
    began, lines = time.monotonic(), order.lines()
    pipe = load_pipeline(order.model, device)
    if getattr(pipe, "transformer_2", None) is not None or getattr(pipe, "image_encoder", None) is not None:
        raise ValueError("only text-to-video models with one transformer can be distilled: Wan 2.1, not 2.2")
    task = _task(recipe, order, pipe, lines, device)
    recipes, base = stage_recipes(recipe, task.curriculum), marks(pipe.transformer)
    _begin(out, resume, {"base": base, "curriculum": task.curriculum.model_dump(mode="json"), "rank": order.rank,
                         "recipes": [r.model_dump(mode="json") for r in recipes]})  # fmt: skip
    beside = Path(resolve(order.model))
    target = beside if order.arm == "gpd" and beside.is_dir() else out
    print(f"students go into {target}", file=sys.stderr)
    keep = partial(_keep, task, base, target)
    looks = lines[-HELD:] or held_out_prompts(LOOKS, PROMPT_SEED)
    held = HeldOut(task, looks, home_of(pipe, order.model).guidance)
    left = None if minutes is None else minutes - (time.monotonic() - began) / 60
    done = distil(task, held, recipes, out, keep, left, resume)
    spent = {key: sum(stage[key] for stage in done["stages"].values()) for key in ("step", "seconds")}
    return {**spent, "steps": sum(r.steps for r in recipes), **done}


def _task(recipe: Recipe, order: Order, pipe, lines: list[str], device: str) -> GpdTask:
    home, state = home_of(pipe, order.model), PartialState()
    slots = order.slots or (state.num_processes if order.adapters() else 16)
    own = {"guidance_start": home.guidance, "guidance_end": home.guidance, "slots": slots}
    curriculum = Curriculum(**own | ARMS[order.arm](home.guidance))
    draw = (lambda rng: rng.choice(lines[:-HELD])) if lines else (lambda rng: caption(sample_scene(rng), rng))
    ground = ground_of(pipe, home, curriculum.base_steps, draw)
    if order.adapters():
        from .adapters import Adapters

        torch.manual_seed(recipe.seed)
        nets = Adapters(pipe.transformer, order.rank)
        ground = replace(ground, decode=None)  # a sheet would take minutes
    else:
        nets = Copies(pipe.transformer, device)
    return GpdTask(recipe, curriculum, nets, ground, (state.process_index, state.num_processes))


def _begin(out: Path, resume: bool, order: dict) -> None:
    """Leave in a folder what is trained there. Without `resume` it is emptied of an earlier training.

    Raises ValueError if what is to be resumed is something else.
    """
    file = out / "order.json"
    if resume and file.is_file() and json.loads(file.read_text()) != json.loads(json.dumps(order)):
        raise ValueError(f"{out} holds another training (see its order.json): start without --resume, or give --out")
    if PartialState().is_main_process:
        for stage in [] if resume else out.glob("k[1-9]*"):
            shutil.rmtree(stage)
        out.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(order) + "\n")
    PartialState().wait_for_everyone()


def _keep(task: GpdTask, base: list[float], target: Path, k: int, facts: dict) -> None:
    """Store the student of a horizon, if it divides the base steps."""
    curriculum, ground = task.curriculum, task.ground
    if curriculum.base_steps % k or not PartialState().is_main_process:
        return
    far = k if len(curriculum.horizons) > 1 else LAST  # a single stage is there to be run in six steps
    steps = curriculum.base_steps // far
    grid = {"levels": ground.levels[::far].tolist(), "times": ground.times[::far].tolist()}
    told = {"steps": steps, "horizon": k, "guidance": 1.0, **grid, "base": base, "held_out": facts}
    made = {"curriculum": curriculum.model_dump(), "recipe": task.recipe.model_dump()}
    store(task.nets, target / f"gpd-N{steps}", told | made)


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
