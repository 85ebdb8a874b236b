"""What a distillation is asked for, and what follows whatever the method: the model, its networks, its folder."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate import PartialState

from ..evaluation.result_log import config_hash
from ..runtime.models import TINY, ModelDefaults, load_pipeline, model_defaults, read_defaults, resolve
from ..world.scene import caption, held_out_prompts, sample_scene
from .networks import FullNetworks, Networks
from .optim import OptimConfig
from .rollouts import RolloutContext, rollout_context
from .stages import StagedTask, TrajectoryValidator
from .video_folder import VideoFolder

RANK = 64  # of adapters if none is given
TOY_SLOTS = {"cpu": 16, "cuda": 64}  # as many cost a GPU hardly more time than 16
LOOKS, HELD = 8, 2  # held-out prompts that are looked at: of the toy world, the last of a file
PROMPT_SEED = 11  # of the former; figures are reported on others


@dataclass(frozen=True)
class DistillJob:
    """What is asked for. The toy world's own model needs neither prompts (a file of one a line) nor adapters."""

    model: str = TINY
    ablation: str | None = None  # a rival or variant of the method; None: the method itself
    prompts: Path | None = None
    rank: int | None = None  # of the adapters; 0: full weights
    videos: Path | None = None  # a folder of them, as `accel world sample` writes it, to begin with; None: noise
    trajectories: int | None = None  # trajectories under way; None: of a large model one for each process

    def is_toy(self) -> bool:
        """Whether the model is of the toy world, whose captions are known."""
        defaults = read_defaults(self.model)
        return defaults is not None and defaults.toy_world

    def adapters(self) -> bool:
        """Whether the students are adapters: for every model but the toy world's, unless full weights are asked for."""
        return not self.is_toy() and self.own_rank() > 0

    def own_rank(self) -> int:
        """Of the adapters, whether given or not."""
        return RANK if self.rank is None else self.rank

    def lines(self, ablations: Collection[str]) -> list[str]:
        """The prompts of the file. Raises ValueError for an order that cannot be carried out."""
        if self.ablation is not None and self.ablation not in ablations:
            raise ValueError(f"unknown arm {self.ablation!r}; there are {', '.join(ablations)}")
        if self.is_toy():
            if self.prompts:
                raise ValueError("this model is trained on captions of its own world: leave --prompts out")
            if self.rank is not None:
                raise ValueError("this model is small, its students are whole: leave --rank out")
            if self.trajectories is not None:
                raise ValueError("how many trajectories this model's students learn on is settled: leave --slots out")
            return []
        if self.prompts is None or not self.prompts.is_file():
            raise ValueError("this model needs prompts to train on: give --prompts FILE, a text file of one a line")
        lines = [line.strip() for line in self.prompts.read_text().splitlines() if line.strip()]
        if len(lines) <= HELD:
            raise ValueError(
                f"{self.prompts} has {len(lines)} prompts: {HELD + 1} are needed, {HELD} of them to look at"
            )
        return lines

    def told(self, lines: list[str]) -> dict:
        """What a folder remembers of it, so that nothing else is resumed there."""
        given = {"prompts": config_hash(lines)} if lines else {}
        given |= {"videos": str(self.videos)} if self.videos else {}
        return {"rank": self.own_rank(), **given}

    def pipeline(self, device: str):
        """The pipeline to distil. Raises ValueError for one that cannot be."""
        pipe = load_pipeline(self.model, device)
        if getattr(pipe, "transformer_2", None) is not None or getattr(pipe, "image_encoder", None) is not None:
            raise ValueError("only text-to-video models with one transformer can be distilled: Wan 2.1, not 2.2")
        return pipe

    def num_trajectories(self) -> int:
        """How many are under way, over all processes."""
        state = PartialState()
        return self.trajectories or (
            TOY_SLOTS.get(state.device.type, TOY_SLOTS["cpu"]) if self.is_toy() else state.num_processes
        )

    def context(self, pipe, defaults: ModelDefaults, base_steps: int, lines: list[str]) -> RolloutContext:
        """Where trajectories run: over the file's prompts, or captions of the toy world."""
        draw = (lambda rng: rng.choice(lines[:-HELD])) if lines else (lambda rng: caption(sample_scene(rng), rng))
        context = rollout_context(pipe, defaults, base_steps, draw)
        if self.videos:
            context = replace(context, clips=VideoFolder(self.videos, pipe, defaults).draw)
        return context if self.is_toy() else replace(context, decode=None)  # a sheet of a large model takes minutes

    def networks(self, transformer, seed: int, device: str) -> Networks:
        """Teacher and students of a transformer."""
        if self.is_toy():
            return FullNetworks(transformer, device)
        if not self.adapters():
            nets = FullNetworks(transformer)
            nets.module.enable_gradient_checkpointing()
            return nets
        from .lora_networks import LoRANetworks

        torch.manual_seed(seed)
        return LoRANetworks(transformer, self.own_rank())

    def beside(self) -> Path | None:
        """The folder of a local model, where its students go."""
        folder = Path(resolve(self.model))
        return folder if folder.is_dir() else None

    def other_job_dir(self, out: Path, what: str) -> Path:
        """The folder in which the same model was trained for something else, beside `out` of this order."""
        return out.parent / what if self.model == TINY else out.parent.parent / what / out.name

    def validation_prompts(self, lines: list[str]) -> list[str]:
        """The prompts that a training is looked at with."""
        return lines[-HELD:] or held_out_prompts(LOOKS, PROMPT_SEED)

    def held_out(self, task: StagedTask, pipe, lines: list[str]) -> TrajectoryValidator:
        """The teacher's ways from these."""
        return TrajectoryValidator(task, self.validation_prompts(lines), model_defaults(pipe, self.model).guidance)


def rank_and_world() -> tuple[int, int]:
    """Which process this is, of how many."""
    return PartialState().process_index, PartialState().num_processes


def prepare_dir(out: Path, resume: bool, optims: Sequence[OptimConfig], job: dict) -> None:
    """Leave in a folder what is trained there, and by which recipes; without `resume`, empty it of earlier stages.

    Raises ValueError if what is to be resumed is something else.
    """
    file, job = out / "order.json", {**job, "optims": [r.model_dump(mode="json") for r in optims]}
    if resume and file.is_file() and json.loads(file.read_text()) != json.loads(json.dumps(job)):
        raise ValueError(f"{out} holds another training (see its order.json): start without --resume, or give --out")
    if PartialState().is_main_process:
        for stage in [] if resume else {file.parent for file in (*out.glob("*/state.pt"), *out.glob("*/done.json"))}:
            shutil.rmtree(stage)
        out.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(job) + "\n")
    PartialState().wait_for_everyone()


def share_stages(other: Path, own: Path, names: Sequence[str], tells: Callable[[dict, int], dict]) -> bool:
    """Let a rival begin with those of its first stages that another training finished; whether there are any.

    `tells(order, stage)`: what of an order tells on a stage and on those before. Nothing is shared with a rival that
    has begun, or where the other's order differs in that.
    """
    file, shared = other / "order.json", []
    if (own / names[0]).is_dir() or not file.is_file():
        return False
    asked, made = (json.loads((folder / "order.json").read_text()) for folder in (own, other))
    for stage, name in enumerate(names):
        if not (other / name / "done.json").is_file() or tells(asked, stage) != tells(made, stage):
            break
        shared.append(name)
    print(f"{len(shared)} of {len(names)} stages are those of {other}", file=sys.stderr)
    PartialState().wait_for_everyone()  # until all have looked
    for name in shared if PartialState().is_main_process else ():
        shutil.copytree(other / name, part := own / f"{name}.part", dirs_exist_ok=True)
        part.rename(own / name)
    PartialState().wait_for_everyone()
    return bool(shared)
