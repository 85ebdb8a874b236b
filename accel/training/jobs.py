"""Distillation jobs: what a user asks for, and the flow from there to stored students, which all methods share."""

from __future__ import annotations

import json
import shutil
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import torch
from accelerate import PartialState
from pydantic import BaseModel
from torch import nn

from ..errors import AccelError, amount
from ..evaluation.result_log import config_hash
from ..families import family_of
from ..files import read_json, read_utf8, write_json
from ..runtime.models import TINY, ModelDefaults, load_pipeline, model_defaults, read_defaults, resolve
from ..students.interval_embedding import unwrapped
from ..students.weights import load_int8_delta
from ..world.scene import caption, held_out_prompts, sample_scene
from .networks import FullNetworks, Networks
from .optimizer import OptimConfig
from .rollouts import RolloutContext, rollout_context
from .stages import distil, remaining, totals
from .tasks.student_task import StagedTask
from .validation import TrajectoryValidator, Validator
from .video_folder import VideoFolder

DEFAULT_RANK = 64
INITIAL_STUDENT = "gpd-N48"  # the GPD student of one base step: it has taken in guidance at one strength
TOY_TRAJECTORIES = {"cpu": 16, "cuda": 64}  # on a GPU, 64 take hardly more time than 16
VALIDATION_PROMPTS = 2  # the last ones of a file of prompts
TOY_VALIDATION_PROMPTS, TOY_VALIDATION_SEED = 8, 11  # held-out prompts of the toy world; results are reported on others


@dataclass(frozen=True)
class DistillJob:
    """What a user asks for. The toy world's own model needs neither a file of prompts nor LoRA."""

    model: str = TINY
    ablation: str | None = None  # a variant of the method; None: the method itself
    prompts: Path | None = None  # a text file with one prompt per line
    rank: int | None = None  # of the LoRA; 0: train all weights
    videos: Path | None = None  # a folder as `accel world sample` writes it, to start trajectories from; None: noise
    trajectories: int | None = None  # over all processes; None: one per process for large models

    def is_toy(self) -> bool:
        """Whether the model is of the toy world, whose captions are known."""
        defaults = read_defaults(self.model)
        return defaults is not None and defaults.toy_world

    def uses_lora(self) -> bool:
        """Whether students are LoRA adapters: for every model but the toy world's, unless the rank is 0."""
        return not self.is_toy() and self.lora_rank() > 0

    def lora_rank(self) -> int:
        """The rank that was given, or the default."""
        return DEFAULT_RANK if self.rank is None else self.rank

    def load_prompts(self) -> list[str]:
        """The prompts of the file, none for the toy world. Raises AccelError if the job is not possible."""
        if self.is_toy():
            if self.prompts:
                raise AccelError("this model is trained on captions of its own world: leave --prompts out")
            if self.rank is not None:
                raise AccelError("this model is small, all weights of its students are trained: leave --rank out")
            if self.trajectories is not None:
                raise AccelError("the number of trajectories is fixed for this model: leave --trajectories out")
            return []
        if self.prompts is None or not self.prompts.is_file():
            raise AccelError("this model needs prompts to train on: give --prompts FILE, a text file with one per line")
        prompts = [line.strip() for line in read_utf8(self.prompts).splitlines() if line.strip()]
        if len(prompts) <= VALIDATION_PROMPTS:
            raise AccelError(
                f"{self.prompts} has {amount(len(prompts), 'prompt')}: at least {VALIDATION_PROMPTS + 1} are needed, "
                f"{VALIDATION_PROMPTS} of them for validation"
            )
        return prompts

    def identity(self, prompts: list[str]) -> dict:
        """What `job.json` records of the request, so that a different job is not resumed."""
        optional = {"prompts": config_hash(prompts)} if prompts else {}
        optional |= {"videos": str(self.videos)} if self.videos else {}
        return {"rank": self.lora_rank(), **optional}

    def num_trajectories(self) -> int:
        """The number of trajectories over all processes."""
        state = PartialState()
        if self.trajectories:
            return self.trajectories
        return (
            TOY_TRAJECTORIES.get(state.device.type, TOY_TRAJECTORIES["cpu"]) if self.is_toy() else state.num_processes
        )

    def model_dir(self) -> Path | None:
        """The folder of a local model, into which its students go; None for a hub id."""
        folder = Path(resolve(self.model))
        return folder if folder.is_dir() else None

    def other_job_dir(self, out: Path, what: str) -> Path:
        """The folder of the job that trains another method or ablation of the same model, given this job's folder."""
        return out.parent / what if self.model == TINY else out.parent.parent / what / out.name


@dataclass(frozen=True)
class LoadedJob:
    """A job with its pipeline: builds what the tasks of all methods are made of."""

    job: DistillJob
    pipe: object
    defaults: ModelDefaults
    prompts: list[str]  # empty for the toy world
    device: str
    out: Path
    goes_on: bool = False  # GPD: from the first student that the model has

    def context(self, base_steps: int) -> RolloutContext:
        """Rollouts over the training prompts of the file, or over captions of the toy world."""
        if self.prompts:
            draw_prompt = lambda rng: rng.choice(self.prompts[:-VALIDATION_PROMPTS])
        else:
            draw_prompt = lambda rng: caption(sample_scene(rng), rng)
        context = rollout_context(self.pipe, self.defaults, base_steps, draw_prompt)
        if self.job.videos:
            context = replace(context, draw_video=VideoFolder(self.job.videos, self.pipe, self.defaults).draw)
        # Decoding sample videos of a large model takes minutes.
        return context if self.job.is_toy() else replace(context, decode=None)

    def networks(self, seed: int) -> Networks:
        """Teacher and students made from the pipeline's transformer; the seed initializes LoRA factors."""
        transformer = self.pipe.transformer
        if self.job.is_toy():
            return FullNetworks(transformer, self.device)
        if not self.job.uses_lora():
            nets = FullNetworks(transformer)
            nets.module.enable_gradient_checkpointing()
            return nets
        from .lora_networks import LoRANetworks

        torch.manual_seed(seed)
        return LoRANetworks(transformer, self.job.lora_rank())

    def validation_prompts(self) -> list[str]:
        """Prompts that are not trained on."""
        return self.prompts[-VALIDATION_PROMPTS:] or held_out_prompts(TOY_VALIDATION_PROMPTS, TOY_VALIDATION_SEED)


class JobSpec(ABC):
    """What is specific to a distillation method; `run_job` does the rest."""

    method: ClassVar[str]  # as in `accel train METHOD`
    ablations: ClassVar[Collection[str]]
    reported: ClassVar[tuple[str, ...]] = ()  # keys of the origin that the summary of the job repeats

    def check(self, job: DistillJob) -> None:
        """Raise AccelError if the method cannot do the job; called before the model is loaded."""
        if job.ablation is not None and job.ablation not in self.ablations:
            raise AccelError(f"unknown ablation {job.ablation!r}; available: {', '.join(self.ablations)}")

    @abstractmethod
    def build(self, loaded: LoadedJob, optim: OptimConfig) -> AbstractContextManager[tuple[StagedTask, dict]]:
        """A context with the task and its origin: what its weights start from, for `job.json` and manifests."""

    @abstractmethod
    def optim_configs(self, optim: OptimConfig, config: BaseModel) -> list[OptimConfig]:
        """The optimizer settings of each stage, given the base settings and the task's config."""

    @abstractmethod
    def save_stage(self, task: StagedTask, origin: dict, results: dict, target: Path, out: Path) -> None:
        """Store the student of a finished stage: a result in `target`, an intermediate student in `out`."""

    def stage_config(self, record: dict, stage: int) -> dict:
        """The fields of a `job.json` that affect stages 0 to `stage`."""
        return {**record, "optims": record["optims"][: stage + 1]}

    def validator(self, task: StagedTask, loaded: LoadedJob) -> Validator:
        """Measures the students of the task."""
        return TrajectoryValidator(task, loaded.validation_prompts(), loaded.defaults.guidance)

    def is_ablation(self, job: DistillJob) -> bool:
        """Whether students stay in the job's folder and may start from stages of the method's own job."""
        return job.ablation not in (None, self.method)

    def describe(self, task: StagedTask) -> list[str]:
        """Lines to print before training."""
        return []


def run_job(
    spec: JobSpec, optim: OptimConfig, job: DistillJob, device: str, minutes: float | None, resume: bool, out: Path,
    save_every: float = 400,
) -> dict:  # fmt: skip
    """Distil a model and store its students; returns a summary of the stages.

    Students go into the folder of a local model, or into `out` for an ablation or a hub id. Raises AccelError for a job
    that is not possible, or if `out` holds a different job that is to be resumed.
    """
    began = time.monotonic()
    spec.check(job)
    prompts = job.load_prompts()
    loaded = replace(_load(job, prompts, device, out), goes_on=goes_on(job, resume, out))
    with spec.build(loaded, optim) as (task, origin):
        optims = share_minutes(spec.optim_configs(optim, task.config))
        record = {**origin, "config": task.config.model_dump(mode="json"), **job.identity(prompts)}
        prepare_dir(out, resume, optims, record)
        if spec.is_ablation(job):
            other = job.other_job_dir(out, spec.method)
            resume |= share_stages(other, out, list(task.stages), spec.stage_config)
        target = out if spec.is_ablation(job) else job.model_dir() or out
        for line in (*spec.describe(task), f"students are stored in {target}"):
            print(line, file=sys.stderr)
        save_stage = lambda results: spec.save_stage(task, origin, results, target, out)
        validator = spec.validator(task, loaded)
        done = distil(task, validator, optims, out, save_stage, remaining(minutes, began), resume, save_every)
    return {**{key: origin[key] for key in spec.reported}, **totals(optims, done)}


def goes_on(job: DistillJob, resume: bool, out: Path) -> bool:
    """Whether a job trains the first GPD student of its model on: one that is resumed without having begun does.

    So does one that began so. A model outside the toy world has a LoRA there, which is trained from the beginning.
    """
    file, folder = out / "job.json", job.model_dir()
    if not resume or file.is_file():
        return resume and "init_from" in read_json(file)
    return job.is_toy() and job.ablation is None and (folder / INITIAL_STUDENT).is_dir()


def share_minutes(optims: list[OptimConfig]) -> list[OptimConfig]:
    """Each stage with its share of the minutes of the whole run, by its steps; `optims` have the whole run's."""
    total = sum(optim.steps for optim in optims)
    return [
        optim.model_copy(update={"minutes": optim.minutes * optim.steps / total}) if optim.minutes else optim
        for optim in optims
    ]


def _load(job: DistillJob, prompts: list[str], device: str, out: Path) -> LoadedJob:
    """Load the model of a job. Raises AccelError for one that cannot be distilled."""
    pipe = load_pipeline(job.model, device)
    if not family_of(pipe).trains_students:
        raise AccelError(f"students are trained for text-to-video pipelines of Wan 2.1 only, not {type(pipe).__name__}")
    others = any(getattr(pipe, part, None) is not None for part in ("transformer_2", "image_encoder"))
    if others or not family_of(pipe).is_stack(pipe.transformer) or pipe.config.get("expand_timesteps"):
        raise AccelError("only text-to-video models with one transformer can be distilled: Wan 2.1, not 2.2 or VACE")
    return LoadedJob(job, pipe, model_defaults(pipe, job.model), prompts, device, out)


def rank_and_world() -> tuple[int, int]:
    """The index of this process and the number of processes."""
    return PartialState().process_index, PartialState().num_processes


def prepare_dir(out: Path, resume: bool, optims: Sequence[OptimConfig], record: dict) -> None:
    """Write a job's record and optimizer settings to `job.json`; without `resume`, remove stages of an earlier job.

    Raises AccelError if a different job is to be resumed.
    """
    file = out / "job.json"
    record = json.loads(json.dumps({**record, "optims": [optim.model_dump(mode="json") for optim in optims]}))
    if resume and file.is_file() and read_json(file) != record:
        raise AccelError(f"{out} holds another job (see its job.json): start without --resume, or give another --out")
    if PartialState().is_main_process:
        for stage in [] if resume else {file.parent for file in (*out.glob("*/state.pt"), *out.glob("*/done.json"))}:
            shutil.rmtree(stage)
        out.mkdir(parents=True, exist_ok=True)
        write_json(file, record)
    PartialState().wait_for_everyone()


def share_stages(other: Path, own: Path, names: Sequence[str], stage_config: Callable[[dict, int], dict]) -> bool:
    """Copy the first stages that another job has finished and this one would train alike; returns whether any are.

    `stage_config(record, stage)`: the fields of a `job.json` that affect stages 0 to `stage`. A job that has already
    begun copies nothing.
    """
    file, shared = other / "job.json", []
    if (own / names[0]).is_dir() or not file.is_file():
        return False
    own_record, other_record = (read_json(folder / "job.json") for folder in (own, other))
    for stage, name in enumerate(names):
        if not (other / name / "done.json").is_file():
            break
        if stage_config(own_record, stage) != stage_config(other_record, stage):
            break
        shared.append(name)
    print(f"{len(shared)} of {len(names)} stages are copied from {other}", file=sys.stderr)
    PartialState().wait_for_everyone()  # before the first copy: all processes must find the same stages
    for name in shared if PartialState().is_main_process else ():
        shutil.copytree(other / name, part := own / f"{name}.part", dirs_exist_ok=True)
        part.rename(own / name)
    PartialState().wait_for_everyone()
    return bool(shared)


@torch.no_grad()
def initialize_from(module: nn.Module, base: nn.Module, folder: Path) -> None:
    """Give a student the base's weights and another student's differences; zeros of a time embedding stay zero."""
    with unwrapped(module), unwrapped(base):
        known = load_int8_delta(base, folder / "model.safetensors")
        for (name, own), original in zip(module.named_parameters(), base.parameters(), strict=True):
            own.copy_(known[name] * (original != 0) if "time_embedder" in name else known[name])
