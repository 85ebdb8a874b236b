"""A distillation from its first stage to its last: train, look at held-out prompts, keep the student, go on."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import PartialState
from safetensors.torch import save_file
from torch import nn

from ..flow import euler
from ..models import home_of, load_pipeline, resolve
from ..weights import marks
from ..world.scene import caption, held_out_prompts, sample_scene
from .fit import Recipe, fit
from .gpd import Curriculum, GpdTask, ground_of, walk
from .students import Copies, velocity

POINTS = 6  # places on the way at which a jump is compared with the teacher's
PATIENCE = 3  # looks in a row without a better student that end a stage
EVERY = 25  # iterations between looks
FIRST = 4  # times the iterations of a stage that the first one has: taking in guidance is the largest error
PROMPT_SEED = 11  # of the prompts that the stop rule looks at; figures are reported on others


class HeldOut:
    """The guided teacher's ways (p, N + 1, c, f, h, w) from prompts and noises unknown to training, walked once."""

    def __init__(self, task: GpdTask, prompts: list[str], guidance: float, seed: int = 1):
        ground, nets = task.ground, task.nets
        self.ground, self.words = ground, ground.encode(prompts)
        noise = torch.Generator().manual_seed(seed)
        x = torch.randn(len(prompts), *ground.shape, generator=noise).to(self.words.device)
        ways = [x]
        for i, t in enumerate(ground.times):
            v = nets.teacher(x, t.expand(len(x)).to(x.device), self.words, task.empty, guidance)
            x = euler(x, v, *(ground.levels[j].expand(len(x)) for j in (i, i + 1)))
            ways.append(x)
        self.ways = torch.stack(ways, 1)

    @torch.no_grad()
    def jump(self, model: nn.Module, k: int) -> float:
        """Mean squared error of the velocity of jumps of k base steps, against the teacher's k steps."""
        places = range(0, len(self.ground.times), k)
        places = places[:: max(1, math.ceil(len(places) / POINTS))]
        return sum(self._jump(model, i, k) for i in places) / len(places)

    def _jump(self, model: nn.Module, i: int, k: int) -> float:
        x, j, levels = self.ways[:, i], min(i + k, len(self.ground.times)), self.ground.levels
        whole = (self.ways[:, j] - x) / float(levels[j] - levels[i])
        t = self.ground.times[i].expand(len(x)).to(x.device)
        return (velocity(model, x, t, self.words) - whole).square().mean().item()

    @torch.no_grad()
    def end(self, model: nn.Module, k: int) -> float:
        """Squared error of the student's video latents, in parts of the teacher's mean square."""
        x, goal = walk(model, self.ground, self.ways[:, 0], self.words, k), self.ways[:, -1]
        return ((x - goal).square().mean() / goal.square().mean()).item()


class Watch:
    """Ends a stage when the held-out error has not fallen for some looks; errors by iteration are kept."""

    def __init__(self, held: HeldOut, model: nn.Module, horizon: int):
        self.held, self.model, self.horizon = held, model, horizon
        self.errors: dict[int, float] = {0: held.jump(model, horizon)}
        self.fired = False

    def __call__(self, step: int) -> bool:
        if step % EVERY:
            return False
        self.errors[step] = self.held.jump(self.model, self.horizon)
        best = min(self.errors, key=self.errors.get)
        self.fired = step - best >= PATIENCE * EVERY
        return self.fired


def store(module: nn.Module, folder: Path, facts: dict) -> None:
    """A student as `model.safetensors` (float16) and `gpd.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: w.half().contiguous() for name, w in module.state_dict().items()}
    save_file(state, folder / "model.safetensors")
    (folder / "gpd.json").write_text(json.dumps(facts, indent=1) + "\n")


def distil(
    task: GpdTask, held: HeldOut, recipes: Callable[[int], Recipe], out: Path, keep: Callable[[int, dict], None],
    minutes: float | None = None, resume: bool = False,
) -> dict:  # fmt: skip
    """Train all stages, or as far as the time goes; what each came to. `keep(horizon, facts)` stores a student.

    A stage that is finished leaves `done.json` and is not trained again.
    """
    began, stages = time.monotonic(), {}
    for stage, k in enumerate(task.curriculum.horizons):
        task.stage, task.recipe, folder = stage, recipes(stage), out / f"k{k}"
        done = folder / "done.json"
        if resume and done.is_file():
            _restore(task, folder / "state.pt")
            stages[k] = json.loads(done.read_text())
        else:
            left = None if minutes is None else minutes - (time.monotonic() - began) / 60
            if left is not None and left <= 0:
                break
            watch = Watch(held, task.module, k)
            summary = fit(task, folder, minutes=left, resume=resume, enough=watch)
            if summary["step"] < summary["steps"] and not watch.fired:
                break  # out of time
            stages[k] = {**summary, "jump": held.jump(task.module, k), "end": held.end(task.module, k)}
            keep(k, stages[k])
            done.write_text(json.dumps({**stages[k], "watched": watch.errors}) + "\n")
        task.nets.next_stage()
    return {"stages": stages, "finished": len(stages) == len(task.curriculum.horizons)}


@torch.no_grad()
def _restore(task: GpdTask, file: Path) -> None:
    """The averaged weights and the slots that a finished stage ended with."""
    state = torch.load(file, map_location="cpu", weights_only=True)
    for weight, averaged in zip(task.module.parameters(), state["ema"]["shadow_params"], strict=True):
        weight.copy_(averaged)
    task.load_state_dict(state["carried"])


def train_gpd(recipe: Recipe, model: str, device: str, minutes: float | None, resume: bool, out: Path) -> dict:
    """Distil a local model of the toy world into students that lie beside it, `gpd-N48` to `gpd-N6`."""
    pipe = load_pipeline(model, device)
    home, state = home_of(pipe, model), PartialState()
    curriculum = Curriculum(guidance_start=home.guidance, guidance_end=home.guidance)
    ground = ground_of(pipe, home, curriculum.base_steps, lambda rng: caption(sample_scene(rng), rng))
    share = (state.process_index, state.num_processes)
    task = GpdTask(recipe, curriculum, Copies(pipe.transformer), ground, share)
    if not (resume and (out / "k1" / "state.pt").is_file()):
        task.stagger()
    held = HeldOut(task, held_out_prompts(8, PROMPT_SEED), home.guidance)
    base = marks(pipe.transformer)

    def keep(k: int, facts: dict) -> None:
        if curriculum.base_steps % k == 0 and state.is_main_process:
            steps = curriculum.base_steps // k
            grid = {"levels": ground.levels[::k].tolist(), "times": ground.times[::k].tolist()}
            told = {"steps": steps, "horizon": k, "guidance": 1.0, **grid, "base": base, "held_out": facts}
            made = {"curriculum": curriculum.model_dump(), "recipe": task.recipe.model_dump()}
            store(task.module, Path(resolve(model)) / f"gpd-N{steps}", told | made)

    recipes = lambda k: recipe.model_copy(update={"steps": recipe.steps * (FIRST if k == 1 else 1)})
    done = distil(task, held, recipes, out, keep, minutes, resume)
    spent = {key: sum(stage[key] for stage in done["stages"].values()) for key in ("step", "seconds")}
    return {**spent, "steps": spent["step"] if done["finished"] else spent["step"] + 1, "stages": done["stages"]}
