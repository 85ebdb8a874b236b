"""The job of DisCa's predictor: the student that it is trained for, its two forms, and how it is stored."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import get_args

import torch
from safetensors.torch import load_file

from ..errors import AccelError
from ..families import family_of
from ..methods.disca.disca import select_full_steps
from ..methods.disca.predictor import Predictor, PredictorForm
from ..runtime.generate import grid
from ..runtime.run import build_run
from ..students.interval_embedding import INTERVAL_EMBEDDER, with_interval_embedder
from ..students.loading import check_base, load_student
from ..students.weights import fingerprint
from .fast_blocks import optimize_blocks
from .feature_probe import FeatureProbe
from .jobs import DistillJob, JobSpec, LoadedJob, rank_and_world
from .optimizer import OptimConfig
from .rollouts import MeanFlowContext
from .stages import store
from .tasks.predictor_fit import PredictorConfig, PredictorTask
from .validation import CachedRolloutValidator

DEPTH = 1  # blocks: one is an eighth of the shipped model, two would be a quarter; the paper's two are under 4 %
SECOND_STAGE_DIVISOR = 3  # the second stage has this many times fewer iterations, at half the rates
VALIDATION_FULL_STEPS = 8


class PredictorJob(JobSpec):
    """A predictor for the MeanFlow student in the model's folder, stored as `predictor/<form>`."""

    method = "predictor"
    ablations = get_args(PredictorForm)

    def check(self, job: DistillJob) -> None:
        super().check(job)
        if job.rank is not None:
            raise AccelError("a predictor is small, all its weights are trained: leave --rank out")

    def is_ablation(self, job: DistillJob) -> bool:
        return False  # both forms are stored in the model's folder

    @contextmanager
    def build(self, loaded: LoadedJob, optim: OptimConfig) -> Iterator[tuple[PredictorTask, dict]]:
        """Inside, the pipeline's transformer is the student."""
        folder, pipe = self._student_dir(loaded), loaded.pipe
        manifest = json.loads((folder / "meanflow.json").read_text())
        check_base(folder, manifest["base_fingerprint"], pipe)
        with ExitStack() as stack:
            stack.enter_context(load_student(folder, pipe.transformer))
            stack.enter_context(with_interval_embedder(pipe.transformer, load_file(folder / INTERVAL_EMBEDDER)))
            form = loaded.job.ablation or self.ablations[0]
            origin = {"form": form, "depth": DEPTH, "student_fingerprint": fingerprint(pipe.transformer)}
            stack.callback(setattr, pipe.transformer, "blocks", pipe.transformer.blocks)
            yield self._task(loaded, optim, manifest, form), origin

    def _student_dir(self, loaded: LoadedJob) -> Path:
        folder = loaded.job.model_dir() or loaded.job.other_job_dir(loaded.out, "meanflow")
        if not (folder / "meanflow" / "meanflow.json").is_file():
            raise AccelError("the student comes first: python -m accel train meanflow")
        return folder / "meanflow"

    def _task(self, loaded: LoadedJob, optim: OptimConfig, manifest: dict, form: str) -> PredictorTask:
        job, pipe = loaded.job, loaded.pipe
        config = PredictorConfig(guidance=manifest["guidance"], trajectories=job.num_trajectories())
        context = MeanFlowContext(**vars(loaded.context(config.steps)), guidance=manifest["teacher_guidance"])
        tokens = grid(pipe, build_run(loaded.defaults, model="", prompt="-"))
        torch.manual_seed(optim.seed)
        predictor = Predictor(family_of(pipe), pipe.transformer, form, DEPTH)
        if job.is_toy():
            for blocks in (pipe.transformer.blocks, predictor.blocks):
                optimize_blocks(blocks, loaded.device)
        student = FeatureProbe(pipe.transformer, checkpointing=not job.is_toy())
        return PredictorTask(optim, config, student, predictor, context, tokens, rank_and_world())

    def validator(self, task: PredictorTask, loaded: LoadedJob) -> CachedRolloutValidator:
        full_steps = select_full_steps(VALIDATION_FULL_STEPS, task.config.steps)
        return CachedRolloutValidator(task, loaded.validation_prompts(), full_steps)

    def optim_configs(self, optim: OptimConfig, config: PredictorConfig) -> list[OptimConfig]:
        steps = max(1, optim.steps // SECOND_STAGE_DIVISOR)
        second = {"steps": steps, "lr": optim.lr / 2, "matrix_lr": optim.matrix_lr / 2}
        return [optim, optim.model_copy(update=second)]

    def save_stage(self, task: PredictorTask, origin: dict, results: dict, target: Path, out: Path) -> None:
        """Store the predictor after a stage: the second one as the result, the first one for comparison."""
        folder = target / "predictor" / origin["form"] if task.stage else out / "regression-only"
        before = out / "regression" / "done.json"
        stages = {"regression": json.loads(before.read_text())} if task.stage else {}
        stages[list(task.stages)[task.stage]] = results
        settings = {"config": task.config.model_dump(), "optim": task.optim.model_dump()}
        store(task, folder, "predictor.json", {**origin, "stages": stages, **settings})
