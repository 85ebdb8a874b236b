"""The job of DisCa's predictor: what it is trained for, its forms, and how it is stored."""

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
from ..methods.disca.predictor import Predictor
from ..methods.disca.predictor_manifest import DEPTH, PredictorForm
from ..runtime.generate import grid
from ..runtime.run import build_run
from ..students.interval_embedding import INTERVAL_EMBEDDER, with_interval_embedder
from ..students.loading import check_base, load_student
from ..students.weights import fingerprint
from .fast_blocks import optimize_blocks
from .feature_probe import FeatureProbe, GuidedProbe
from .jobs import DistillJob, JobSpec, LoadedJob, rank_and_world
from .optimizer import OptimConfig
from .rollouts import MeanFlowContext, RolloutContext
from .stages import store
from .tasks.predictor_fit import PredictorConfig, PredictorTask
from .validation import CachedRolloutValidator

GUIDED_RUNS = {
    "steps": 50,
    "strides": (1,),
    "full": (8, 16),
    "guidance": None,
    "adversarial": 0,  # on the student, a second stage gained nothing that was shown
}  # of the base model: wider gaps than a student's
SECOND_STAGE_DIVISOR = 3  # the second stage has this many times fewer iterations, at half the rates
VALIDATION_FULL_STEPS = 8


class PredictorJob(JobSpec):
    """A predictor for the MeanFlow student in the model's folder, or for the model itself: `predictor/<form>`."""

    method = "predictor"
    ablations = get_args(PredictorForm)

    def check(self, job: DistillJob) -> None:
        super().check(job)
        if job.rank is not None:
            raise AccelError("a predictor is small, all its weights are trained: leave --rank out")

    def is_ablation(self, job: DistillJob) -> bool:
        return False  # all forms are stored in the model's folder

    @contextmanager
    def build(self, loaded: LoadedJob, optim: OptimConfig) -> Iterator[tuple[PredictorTask, dict]]:
        """Inside, the pipeline's transformer is the student; for the form `guided-base` it stays the base model."""
        form, pipe = loaded.job.ablation or self.ablations[0], loaded.pipe
        with ExitStack() as stack:
            if form == "guided-base":
                trajectories = loaded.job.num_trajectories()
                if loaded.job.is_toy():  # both branches of guidance run: as much work as an iteration for a student
                    trajectories //= GuidedProbe.branches
                config = PredictorConfig(**GUIDED_RUNS, trajectories=trajectories)
                context = loaded.context(config.steps)
            else:
                config, context = self._student(loaded, stack)
            origin = {"form": form, "depth": DEPTH[form], "student_fingerprint": fingerprint(pipe.transformer)}
            origin |= {"guidance": loaded.defaults.guidance} if form == "guided-base" else {}
            stack.callback(setattr, pipe.transformer, "blocks", pipe.transformer.blocks)
            yield self._task(loaded, optim, config, context, form), origin

    def _student(self, loaded: LoadedJob, stack: ExitStack) -> tuple[PredictorConfig, MeanFlowContext]:
        """Put the MeanFlow student in the place of the base model, until the stack closes; its runs and its context."""
        folder, pipe = self._student_dir(loaded), loaded.pipe
        manifest = json.loads((folder / "meanflow.json").read_text())
        check_base(folder, manifest["base_fingerprint"], pipe)
        stack.enter_context(load_student(folder, pipe.transformer))
        stack.enter_context(with_interval_embedder(pipe.transformer, load_file(folder / INTERVAL_EMBEDDER)))
        config = PredictorConfig(guidance=manifest["guidance"], trajectories=loaded.job.num_trajectories())
        return config, MeanFlowContext(**vars(loaded.context(config.steps)), guidance=manifest["teacher_guidance"])

    def _student_dir(self, loaded: LoadedJob) -> Path:
        folder = loaded.job.model_dir() or loaded.job.other_job_dir(loaded.out, "meanflow")
        if not (folder / "meanflow" / "meanflow.json").is_file():
            raise AccelError("the student comes first: python -m accel train meanflow")
        return folder / "meanflow"

    def _task(
        self, loaded: LoadedJob, optim: OptimConfig, config: PredictorConfig, context: RolloutContext, form: str
    ) -> PredictorTask:
        job, pipe = loaded.job, loaded.pipe
        tokens = grid(pipe, build_run(loaded.defaults, model="", prompt="-"))
        torch.manual_seed(optim.seed)
        predictor = Predictor(family_of(pipe), pipe.transformer, form, DEPTH[form])
        if job.is_toy():
            for blocks in (pipe.transformer.blocks, predictor.blocks):
                optimize_blocks(blocks, loaded.device)
        probe = FeatureProbe(pipe.transformer, checkpointing=not job.is_toy())
        if form == "guided-base":
            probe = GuidedProbe(probe, context.encode([""]), loaded.defaults.guidance)
        return PredictorTask(optim, config, probe, predictor, context, tokens, rank_and_world())

    def validator(self, task: PredictorTask, loaded: LoadedJob) -> CachedRolloutValidator:
        full_steps = select_full_steps(VALIDATION_FULL_STEPS, task.config.steps)
        return CachedRolloutValidator(task, loaded.validation_prompts()[:: task.student.branches], full_steps)

    def optim_configs(self, optim: OptimConfig, config: PredictorConfig) -> list[OptimConfig]:
        if not config.adversarial:
            return [optim]
        steps = max(1, optim.steps // SECOND_STAGE_DIVISOR)
        second = {"steps": steps, "lr": optim.lr / 2, "matrix_lr": optim.matrix_lr / 2}
        return [optim, optim.model_copy(update=second)]

    def save_stage(self, task: PredictorTask, origin: dict, results: dict, target: Path, out: Path) -> None:
        """Store the predictor after a stage: the last one as the result, an earlier one for comparison."""
        is_last = task.stage == len(task.stages) - 1
        folder = target / "predictor" / origin["form"] if is_last else out / "regression-only"
        before = out / "regression" / "done.json"
        stages = {"regression": json.loads(before.read_text())} if task.stage else {}
        stages[list(task.stages)[task.stage]] = results
        settings = {"config": task.config.model_dump(), "optim": task.optim.model_dump()}
        store(task, folder, "predictor.json", {**origin, "stages": stages, **settings})
