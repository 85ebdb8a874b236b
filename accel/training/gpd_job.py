"""The job of guided progressive distillation: its ablations, the cost of its stages, how its students are stored."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ..ops.spectrum import high_pass
from ..runtime.solvers import schedule_shift
from ..students.weights import fingerprint
from .jobs import INITIAL_STUDENT, JobSpec, LoadedJob, initialize_from, rank_and_world
from .optimizer import OptimConfig
from .stages import store
from .tasks.gpd_distillation import TARGET_SCHEMES, GpdConfig, GpdTask

LAST_HORIZON = 8
FIRST_STAGE_FACTOR = 32  # iterations of the first stage relative to others, at twice the rates: guidance is hardest
TRAINING_COST = 3  # a forward and backward pass of the student, in forward passes


class GpdJob(JobSpec):
    """48 guided steps into 24, 12, 8 and 6 (and 48, 16) without guidance, each stored as `gpd-N<steps>`."""

    method = "gpd"
    ablations: dict[str, Callable[[float], dict]] = {  # the model's own guidance -> fields of the config
        "gpd": lambda w: {"spatial_weight": 0.3, "temporal_weight": 0.3},
        "no-constraint": lambda w: {},
        "annealed": lambda w: {"guidance_start": 1.5 * w, "guidance_end": max(1.0, 0.375 * w),
                               "guidance_anneal": "stage", "spatial_weight": 0.3, "temporal_weight": 0.3},
        "halving": lambda w: {"target_scheme": "halving", "horizons": (1, 2, 4, LAST_HORIZON)},
        "direct": lambda w: {"target_scheme": "direct", "horizons": (LAST_HORIZON,)},
        "guidance-only": lambda w: {"horizons": (1,)},
    }  # fmt: skip

    @contextmanager
    def build(self, loaded: LoadedJob, optim: OptimConfig) -> Iterator[tuple[GpdTask, dict]]:
        pipe, guidance = loaded.pipe, loaded.defaults.guidance
        origin = {"base_fingerprint": fingerprint(pipe.transformer), "shift": schedule_shift(pipe.scheduler)}
        fields = {"guidance_start": guidance, "guidance_end": guidance, "trajectories": loaded.job.num_trajectories()}
        config = GpdConfig(**fields | self.ablations[loaded.job.ablation or self.method](guidance))
        context, nets = loaded.context(config.base_steps), loaded.networks(optim.seed)
        if loaded.goes_on:  # also that of an earlier base: its difference brings a part of the guidance
            origin["init_from"] = INITIAL_STUDENT
            initialize_from(nets.module, pipe.transformer, loaded.job.model_dir() / INITIAL_STUDENT)
        yield GpdTask(optim, config, nets, context, rank_and_world()), origin

    def describe(self, task: GpdTask) -> list[str]:
        if not (task.config.spatial_weight or task.config.temporal_weight):
            return []
        return [f"the last stage weights {describe_high_frequencies(task.context.shape)}"]

    def optim_configs(self, optim: OptimConfig, config: GpdConfig) -> list[OptimConfig]:
        """Optimizer settings of each stage, so that every ablation costs as many forward passes as GPD itself."""
        own, fast = GpdConfig(), {"lr": 2 * optim.lr, "matrix_lr": 2 * optim.matrix_lr}
        horizons = own.horizons[1:]
        budget = optim.steps * (
            FIRST_STAGE_FACTOR * iteration_cost(own, 1) + sum(iteration_cost(own, k) for k in horizons)
        )
        has_first_stage = config.horizons[0] == 1 and len(config.horizons) > 1
        first = (
            [optim.model_copy(update={"steps": FIRST_STAGE_FACTOR * optim.steps, **fast})] if has_first_stage else []
        )
        rest = config.horizons[len(first) :]
        left = budget - sum(stage.steps * iteration_cost(config, 1) for stage in first)
        steps = round(left / sum(iteration_cost(config, k) for k in rest))
        each = optim.model_copy(update={"steps": steps, **({} if has_first_stage else fast)})
        return [*first, *[each] * len(rest)]

    def stage_config(self, record: dict, stage: int) -> dict:
        """Leaves out what has no effect yet: frequency weights before the last stage, the scheme at horizon 1."""
        config = record["config"]
        horizons, is_last = config["horizons"][: stage + 1], stage + 1 == len(config["horizons"])
        ignored = set() if is_last else {"spatial_weight", "temporal_weight"}
        ignored |= {"target_scheme"} if horizons == [1] else set()
        fields = {key: value for key, value in config.items() if key not in ignored}
        fields |= {"horizons": horizons, "last": is_last}
        return {**super().stage_config(record, stage), "config": fields}

    def save_stage(self, task: GpdTask, origin: dict, results: dict, target: Path, out: Path) -> None:
        """Store the student of a stage if its horizon divides the base steps."""
        config, context = task.config, task.context
        if config.base_steps % task.horizon:
            return
        stride = task.horizon if len(config.horizons) > 1 else LAST_HORIZON  # a single stage is run in six steps
        steps = config.base_steps // stride
        schedule = {"sigmas": context.sigmas[::stride].tolist(), "timesteps": context.timesteps[::stride].tolist()}
        facts = {"steps": steps, "horizon": task.horizon, "guidance": 1.0, **schedule, **origin, "validation": results}
        settings = {"config": config.model_dump(), "optim": task.optim.model_dump()}
        store(task.nets, target / f"gpd-N{steps}", "gpd.json", facts | settings)


def describe_high_frequencies(shape: tuple[int, ...]) -> str:
    """A drawing of which frequencies of latents (c, f, h, w) the frequency loss counts as high: # for each of them."""
    spatial, temporal = (mask.int() for mask in high_pass(shape[1:]))
    draw = lambda line: "".join(".#"[on] for on in line.tolist())
    return f"temporal frequencies {draw(temporal[:, 0, 0])}, spatial ones {' '.join(map(draw, spatial[0]))}"


def iteration_cost(config: GpdConfig, k: int) -> int:
    """Forward passes of an iteration of horizon k: those of its target, and training the student."""
    pieces = TARGET_SCHEMES[config.target_scheme](k)
    return sum(2 if network == "teacher" else 1 for network, _ in pieces) + TRAINING_COST
