"""What running any student takes: its weights in the denoiser's place, its levels, one branch, no negative prompt."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TypeVar

import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from pydantic import BaseModel, ValidationError
from torch import Tensor, nn

from .flow import euler
from .hooks import instead
from .host import Host
from .weights import ADAPTER, adapted, bears, check_adapter, load_differences, replaced

S = TypeVar("S", bound=BaseModel)


class Grid(SchedulerMixin, ConfigMixin):
    """Given noise levels, first order, as a scheduler of the stock pipeline."""

    order = 1

    @register_to_config
    def __init__(self, levels: tuple[float, ...] = (1.0, 0.0), times: tuple[float, ...] = (999.0,)):
        self.sigmas, self.timesteps = torch.tensor(levels), torch.tensor(times)

    def set_timesteps(self, num_inference_steps: int, device=None) -> None:
        """Raises ValueError for any other number of steps than the student's."""
        if num_inference_steps != len(self.timesteps):
            raise ValueError(
                f"this student makes {len(self.timesteps)} steps, not {num_inference_steps}: "
                f"set steps to {len(self.timesteps)}, or choose another student"
            )
        self.timesteps = self.timesteps.to(device)

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Nothing to set: a step is known by its timestep."""

    def step(self, model_output: Tensor, timestep: Tensor, sample: Tensor, return_dict: bool = True):
        """The sample at the next level."""
        i = int((self.timesteps == timestep).nonzero()[0])
        now, then = (level.expand(len(sample)) for level in (self.sigmas[i], self.sigmas[i + 1]))
        x = euler(sample.float(), model_output.float(), now, then).to(sample.dtype)
        return SchedulerOutput(prev_sample=x) if return_dict else (x,)


@contextmanager
def gridded(pipe, levels: list[float], times: list[float]) -> Iterator[None]:
    """Inside, the pipeline takes its steps on these levels, by Euler."""
    own = pipe.scheduler
    pipe.scheduler = Grid(tuple(levels), tuple(times))
    try:
        yield
    finally:
        pipe.scheduler = own


def by_student(pipe) -> bool:
    """Whether the pipeline takes a student's steps now."""
    return isinstance(pipe.scheduler, Grid)


@contextmanager
def first_order(pipe, steps: int) -> Iterator[None]:
    """Inside, the pipeline takes so many steps by Euler, on the noise levels and times of its own solver."""
    pipe.scheduler.set_timesteps(steps)
    with gridded(pipe, pipe.scheduler.sigmas.tolist(), pipe.scheduler.timesteps.tolist()):
        yield


def placed(folder: Path, module: nn.Module) -> AbstractContextManager:
    """A context in which the weights of a student's folder are the module's.

    Raises ValueError for full weights where the module has adapters.
    """
    if (folder / ADAPTER).is_file():
        return adapted(module, folder)
    if getattr(module, "peft_config", None):
        raise ValueError(f"student {folder.name!r} replaces all weights, which a LoRA is on: unload the LoRA first")
    return replaced(module, load_differences(module, folder / "model.safetensors"))


def bytes_of(folder: Path, module: nn.Module) -> int:
    """The weights that wait while a student's are in their place; for an adapter, the adapter."""
    if (folder / ADAPTER).is_file():
        return (folder / ADAPTER).stat().st_size
    return sum(p.numel() * p.element_size() for p in module.parameters())


@contextmanager
def one_branch(host: Host) -> Iterator[None]:
    """Inside, guidance and negative prompts are refused: what they ask for is built into a student, or not in it."""

    def call(inner: Callable, x: Tensor, **inputs) -> Tensor:
        if host.family.is_guided(host.pipe):
            raise ValueError("a student has guidance built in, more of it burns the colours: set guidance to 1")
        if not by_student(host.pipe):
            solver = type(host.pipe.scheduler).__name__
            raise ValueError(
                f"a student gives mean velocities, {solver} takes them for slopes: leave the scheduler alone"
            )
        check_adapter(host.models[host.model], (inputs.get("attention_kwargs") or {}).get("scale", 1))
        return inner(x, **inputs)

    with host.wrap_denoiser(call), _no_negative(host.pipe):
        yield


@contextmanager
def _no_negative(pipe) -> Iterator[None]:
    """Inside, a negative prompt is refused: the stock pipeline would drop it without a word, as it runs one branch."""
    encode = pipe.encode_prompt
    signature = inspect.signature(encode)

    def refuse(*args, **given):
        asked = signature.bind(*args, **given).arguments
        texts = asked.get("negative_prompt") or ""
        given_one = any([texts] if isinstance(texts, str) else texts) or asked.get("negative_prompt_embeds") is not None
        if given_one and not asked.get("do_classifier_free_guidance", True):  # with guidance the run is refused anyway
            raise ValueError("a student has no unconditional branch for a negative prompt to act in: leave it out")
        return encode(*args, **given)

    with instead(pipe, "encode_prompt", refuse):
        yield


def read(folder: Path, name: str, kind: type[S], knob: str, command: str) -> S:
    """What the file `name` says of what was trained in a folder.

    Raises ValueError if there is none: `knob` names another folder, `command` makes one.
    """
    file, what = folder / name, knob.partition(".")[2]
    if not file.is_file():
        others = sorted(p.parent.name for p in folder.parent.glob(f"*/{name}")) or [f"none: python -m accel {command}"]
        raise ValueError(
            f"there is no {what} {folder.name!r} in that place ({knob} names another); there are {', '.join(others)}"
        )
    try:
        return kind.model_validate_json(file.read_text())
    except ValidationError as error:
        raise ValueError(f"{file} is no {what}: {error.errors()[0]['msg']}") from None


def check_base(folder: Path, base: list[float], pipe) -> None:
    """Raise ValueError if the student in a folder was made from another transformer than the pipeline's."""
    if by_student(pipe):
        raise ValueError(f"student {folder.name!r} and another one do not go together: each replaces the whole model")
    if getattr(pipe, "transformer_2", None) is not None:
        raise ValueError(f"student {folder.name!r} replaces one transformer, this pipeline has two")
    if not bears(pipe.transformer, base):
        raise ValueError(f"student {folder.name!r} was made from another base model: train it from this one")
