"""GPD (Liang et al., arXiv 2602.01814): a student that goes the way of 48 guided steps in 6 calls.

Students are distilled beforehand (`python -m accel train gpd`) and lie beside their base model, a folder for each
number of steps: weights, and `gpd.json` with the noise levels and timesteps they learnt. A student's output is the
mean velocity of a whole interval with guidance built in. So it runs on exactly these levels, first order, unguided;
a multistep solver would extrapolate means as if they were slopes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from pydantic import BaseModel, Field, ValidationError
from torch import Tensor

from ..flow import euler
from ..host import Host
from ..trace import Trace
from ..weights import bears, replaced
from .base import Method


class Student(BaseModel, frozen=True):
    """What `gpd.json` says of a student, as far as running it goes."""

    steps: int = Field(ge=1)
    levels: Annotated[list[float], Field(min_length=2)]  # steps + 1 of them, from 1 to 0
    times: Annotated[list[float], Field(min_length=1)]
    base: list[float]  # marks of the transformer it was made from


class Grid(SchedulerMixin, ConfigMixin):
    """The student's own noise levels, first order, as a scheduler of the stock pipeline."""

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


class GPD(Method):
    """Runs the student of a number of steps in place of the denoiser."""

    title: ClassVar[str] = "GPD"
    paper: ClassVar[str] = "arXiv 2602.01814"
    neutral: ClassVar[dict] = {"steps": 0}

    steps: Literal[0, 6, 8, 12, 16, 24, 48] = Field(
        6, description="Steps of the student (0: no student); fewer lose fine detail first."
    )
    student: str = Field(
        "", description="Folder of a student; empty: beside the model.", json_schema_extra={"page": False}
    )

    @contextmanager
    def apply(self, host: Host, trace: Trace) -> Iterator[None]:
        """The student's weights and levels in the pipeline for the time of the context."""
        if not self.steps:
            yield
            return
        folder = Path(self.student or Path(host.pipe.name_or_path or "nowhere") / f"gpd-N{self.steps}")
        student = load_student(folder, host.pipe)

        def call(inner: Callable, x: Tensor, **inputs) -> Tensor:
            if host.family.is_guided(host.pipe):
                raise ValueError("a student has guidance built in, more of it burns the colours: set guidance to 1")
            return inner(x, **inputs)

        scheduler = host.pipe.scheduler
        with replaced(host.models[0], folder / "model.safetensors"), host.wrap_denoiser(call):
            host.pipe.scheduler = Grid(tuple(student.levels), tuple(student.times))
            try:
                yield
            finally:
                host.pipe.scheduler = scheduler


def load_student(folder: Path, pipe) -> Student:
    """What is known of the student in a folder. Raises ValueError if there is none or it is of another base."""
    file = folder / "gpd.json"
    if not file.is_file():
        others = sorted(p.name for p in folder.parent.glob("gpd-N*")) or ["none: python -m accel train gpd makes them"]
        raise ValueError(f"there is no student {folder.name!r} beside this model; there are {', '.join(others)}")
    try:
        student = Student.model_validate_json(file.read_text())
    except ValidationError as error:
        raise ValueError(f"{file} is no student: {error.errors()[0]['msg']}") from None
    if getattr(pipe, "transformer_2", None) is not None or not bears(pipe.transformer, student.base):
        raise ValueError(f"student {folder.name!r} was made from another base model: train it from this one")
    return student
