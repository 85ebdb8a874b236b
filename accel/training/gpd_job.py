"""GPD as it is ordered: stage after stage, or a rival of equal compute; where its students go."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from accelerate import PartialState

from ..ops.spectrum import high_pass
from ..runtime.models import model_defaults
from ..students.weights import fingerprint
from .jobs import DistillJob, prepare_dir, rank_and_world, share_stages
from .optim import OptimConfig
from .stages import distil, remaining, store, totals
from .tasks.gpd_distillation import TARGET_SCHEMES, GpdConfig, GpdTask

LAST = 8  # horizon of the last student
FIRST = 32  # times a stage's iterations in the first one, at twice the rates: taking in guidance is the largest error
TRAINED = 3  # forward passes that a forward and a backward pass together cost
ABLATIONS: dict[str, Callable[[float], dict]] = {  # GPD and its rivals: the curriculum at the model's own guidance
    "gpd": lambda w: {"spatial_weight": 0.3, "temporal_weight": 0.3},
    "no-constraint": lambda w: {},
    "annealed": lambda w: {"guidance_start": 1.5 * w, "guidance_end": max(1.0, 0.375 * w), "guidance_anneal": "stage",
                           "spatial_weight": 0.3, "temporal_weight": 0.3},
    "halving": lambda w: {"target_scheme": "halving", "horizons": (1, 2, 4, LAST)},
    "direct": lambda w: {"target_scheme": "direct", "horizons": (LAST,)},
    "guidance-only": lambda w: {"horizons": (1,)},
}  # fmt: skip


def train_gpd(optim: OptimConfig, job: DistillJob, device: str, minutes: float | None, resume: bool, out: Path) -> dict:
    """Distil a model into students; GPD's lie beside a local model, `gpd-N48` to `gpd-N6`, a rival's in `out`.

    Raises ValueError for an order that cannot be carried out, or a resume of another order.
    """
    began, lines = time.monotonic(), job.lines(ABLATIONS)
    pipe = job.pipeline(device)
    task = _task(optim, job, pipe, lines, device)
    optims, base = stage_recipes(optim, task.config), fingerprint(pipe.transformer)
    told = {"base_fingerprint": base, "config": task.config.model_dump(mode="json"), **job.told(lines)}
    prepare_dir(out, resume, optims, told)
    own = job.ablation in (None, "gpd")
    if not own:
        resume |= share_stages(job.other_job_dir(out, "gpd"), out, list(task.stages), _stage_config)
    target = job.beside() if own and job.beside() else out
    print(f"students go into {target}", file=sys.stderr)
    if task.config.spatial_weight or task.config.temporal_weight:
        print(f"the last stage weighs {masked(task.context.shape)}", file=sys.stderr)
    about = {"base_fingerprint": base, "shift": shift_of(pipe.scheduler)}
    held, keep = job.held_out(task, pipe, lines), partial(_save_stage, task, about, target)
    return totals(optims, distil(task, held, optims, out, keep, remaining(minutes, began), resume))


def _task(optim: OptimConfig, job: DistillJob, pipe, lines: list[str], device: str) -> GpdTask:
    defaults = model_defaults(pipe, job.model)
    own = {
        "guidance_start": defaults.guidance,
        "guidance_end": defaults.guidance,
        "trajectories": job.num_trajectories(),
    }
    config = GpdConfig(**own | ABLATIONS[job.ablation or "gpd"](defaults.guidance))
    context = job.context(pipe, defaults, config.base_steps, lines)
    nets = job.networks(pipe.transformer, optim.seed, device)
    return GpdTask(optim, config, nets, context, rank_and_world())


def _save_stage(task: GpdTask, about: dict, target: Path, facts: dict) -> None:
    """Store a stage's student, if its horizon divides the base steps."""
    config, context, k = task.config, task.context, task.horizon
    if config.base_steps % k or not PartialState().is_main_process:
        return
    far = k if len(config.horizons) > 1 else LAST  # a single stage is there to be run in six steps
    steps = config.base_steps // far
    grid = {"sigmas": context.levels[::far].tolist(), "timesteps": context.times[::far].tolist()}
    told = {"steps": steps, "horizon": k, "guidance": 1.0, **grid, **about, "validation": facts}
    made = {"config": config.model_dump(), "optim": task.optim.model_dump()}
    store(task.nets, target / f"gpd-N{steps}", "gpd.json", told | made)


def _stage_config(job: dict, stage: int) -> dict:
    """What of an order tells on a stage and on those before it: weights of frequencies on the last one alone."""
    config = job["config"]
    horizons, last = config["horizons"][: stage + 1], stage + 1 == len(config["horizons"])
    silent = {
        *(() if last else ("spatial_weight", "temporal_weight")),
        *(("target_scheme",) if horizons == [1] else ()),
    }
    told = {knob: value for knob, value in config.items() if knob not in silent}
    told |= {"horizons": horizons, "last": last}
    return {**job, "config": told, "optims": job["optims"][: stage + 1]}


def shift_of(scheduler) -> float | None:
    """How far a scheduler shifts its levels towards noise, where it is told a number."""
    config = scheduler.config
    return config.get("flow_shift", config.get("shift"))


def masked(shape: tuple[int, ...]) -> str:
    """Which frequencies of latents (c, f, h, w) the constraint takes for high ones: a # for each that counts."""
    spatial, temporal = (mask.int() for mask in high_pass(shape[1:]))
    draw = lambda line: "".join(".#"[on] for on in line.tolist())
    return f"temporal frequencies {draw(temporal[:, 0, 0])}, spatial ones {' '.join(map(draw, spatial[0]))}"


def cost(config: GpdConfig, k: int) -> int:
    """Forward passes that an iteration of horizon k costs: the pieces of its target, and the student's own."""
    return sum(2 if who == "teacher" else 1 for who, _ in TARGET_SCHEMES[config.target_scheme](k)) + TRAINED


def stage_recipes(optim: OptimConfig, config: GpdConfig) -> list[OptimConfig]:
    """A recipe for each stage, so that every curriculum costs as many forward passes as GPD's own."""
    own, fast = GpdConfig(), {"lr": 2 * optim.lr, "matrix_lr": 2 * optim.matrix_lr}
    whole = optim.steps * (FIRST * cost(own, 1) + sum(cost(own, k) for k in own.horizons[1:]))
    begins = config.horizons[0] == 1 and len(config.horizons) > 1
    first = [optim.model_copy(update={"steps": FIRST * optim.steps, **fast})] if begins else []
    rest = config.horizons[len(first) :]
    left = whole - sum(r.steps * cost(config, 1) for r in first)
    each = {"steps": round(left / sum(cost(config, k) for k in rest)), **({} if begins else fast)}
    return [*first, *[optim.model_copy(update=each)] * len(rest)]
