"""The job of Restricted MeanFlow: its ablations, the weights that it starts from, and how its students are stored."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import nn

from ..students.interval_embedding import IntervalEmbedder
from ..students.weights import fingerprint, matches_fingerprint
from .jobs import INITIAL_STUDENT, JobSpec, LoadedJob, initialize_from, rank_and_world
from .optimizer import OptimConfig
from .rollouts import MeanFlowContext
from .stages import store
from .tasks.meanflow_distillation import MeanFlowConfig, MeanFlowTask, max_step_width

FIRST_STAGE_FACTOR = 2  # iterations of the first stage relative to the second, at twice the rates: its error remains
SECOND_STAGE_FIELDS = ("max_interval", "limit_to_schedule", "jvp", "source")  # of the config; the first ignores them
MAX_WARM = 100  # iterations over which the second stage phases the correction in
STEPS = (20, 10)  # step counts that the student is trained for


class MeanFlowJob(JobSpec):
    """First the guidance, then mean velocities; the student is stored as `meanflow`."""

    method = "meanflow"
    ablations: dict[str, dict] = {  # fields of the config; R is the widest interval of the schedules by default
        "meanflow": {},
        "even": {"limit_to_schedule": False},
        "exact": {"jvp": "exact"},
        "unrestricted": {"max_interval": 1.0, "limit_to_schedule": False},
        "guided": {"source": "base"},  # the second stage then also learns guidance that the first has missed
    }
    reported = ("init_from",)

    @contextmanager
    def build(self, loaded: LoadedJob, optim: OptimConfig) -> Iterator[tuple[MeanFlowTask, dict]]:
        job, guidance = loaded.job, loaded.defaults.guidance
        transformer = loaded.pipe.transformer.float()  # du/dt is a small difference, which bfloat16 would drown
        origin = {"base_fingerprint": fingerprint(transformer), "init_from": None}
        fields = {"max_interval": max_step_width(loaded.pipe.scheduler, STEPS), "steps": STEPS}
        fields |= {"guidance": (max(1.0, 0.5 * guidance), 1.25 * guidance), "trajectories": job.num_trajectories()}
        fields["warm"] = max(1, min(MAX_WARM, optim.steps // 3))  # a short stage must see the whole correction
        config = MeanFlowConfig(**fields | self.ablations[job.ablation or self.method])
        context = MeanFlowContext(**vars(loaded.context(config.base_steps)), guidance=guidance)
        model_dir = job.model_dir()
        if not job.uses_lora() and model_dir and has_initial_student(model_dir, transformer):
            origin["init_from"] = INITIAL_STUDENT
        transformer.condition_embedder = IntervalEmbedder(transformer.condition_embedder)
        nets = loaded.networks(optim.seed)
        if origin["init_from"]:
            initialize_from(nets.module, transformer, model_dir / INITIAL_STUDENT)
        yield MeanFlowTask(optim, config, nets, context, rank_and_world()), origin

    def describe(self, task: MeanFlowTask) -> list[str]:
        return [f"intervals up to R = {task.config.max_interval:.3f}"]

    def optim_configs(self, optim: OptimConfig, config: MeanFlowConfig) -> list[OptimConfig]:
        fast = {"steps": FIRST_STAGE_FACTOR * optim.steps, "lr": 2 * optim.lr, "matrix_lr": 2 * optim.matrix_lr}
        return [optim.model_copy(update=fast), optim]

    def stage_config(self, record: dict, stage: int) -> dict:
        config = {key: value for key, value in record["config"].items() if stage or key not in SECOND_STAGE_FIELDS}
        return {**super().stage_config(record, stage), "config": config}

    def save_stage(self, task: MeanFlowTask, origin: dict, results: dict, target: Path, out: Path) -> None:
        """Store a stage's student: the second one as the result, the first one for comparison."""
        config, context = task.config, task.context
        folder = out / "guidance-only" if task.stage == 0 else target / "meanflow"
        facts = {**origin, "guidance": config.guidance, "teacher_guidance": context.guidance,
                 "max_interval": config.max_interval, "guidance_only": context.guidance_only, "validation": results,
                 "config": config.model_dump(), "optim": task.optim.model_dump()}  # fmt: skip
        store(task.nets, folder, "meanflow.json", facts)


def has_initial_student(model_dir: Path, transformer: nn.Module) -> bool:
    """Whether a model's folder has a student that has taken in guidance and was made from this very model."""
    folder = model_dir / INITIAL_STUDENT
    if not (folder / "model.safetensors").is_file():
        return False
    if matches_fingerprint(transformer, json.loads((folder / "gpd.json").read_text())["base_fingerprint"]):
        return True
    print(f"{folder} was made from another base model: the first stage starts from the base model", file=sys.stderr)
    return False
