"""GPD (Liang et al., arXiv 2602.01814): a student that goes the way of 48 guided steps in 6 calls.

Students are distilled beforehand (`python -m accel train gpd`) and lie beside their base model, a folder for each
number of steps: weights, and `gpd.json` with the noise levels and timesteps they learnt. A student's output is the
mean velocity of a whole interval with guidance built in. So it runs on exactly these levels, first order, unguided;
a multistep solver would extrapolate means as if they were slopes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import ModuleType
from typing import Annotated, ClassVar, Literal, get_args

import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from pydantic import BaseModel, Field, ValidationError
from torch import Tensor, nn

from ..flow import euler
from ..host import Host
from ..trace import Trace
from ..weights import ADAPTER, adapted, bears, load_differences, replaced
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


@contextmanager
def first_order(pipe, steps: int) -> Iterator[None]:
    """Inside, the pipeline takes so many steps by Euler, on the noise levels and times of its own solver."""
    own = pipe.scheduler
    own.set_timesteps(steps)
    pipe.scheduler = Grid(tuple(own.sigmas.tolist()), tuple(own.timesteps.tolist()))
    try:
        yield
    finally:
        pipe.scheduler = own


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

    @classmethod
    def offered(cls, model: str | Path) -> dict[str, list]:
        """Step counts of the students beside a model."""
        found = [
            n for n in get_args(cls.model_fields["steps"].annotation) if (_beside(model, n) / "gpd.json").is_file()
        ]
        return {"steps": [0, *found] if found else []}

    def files(self, model: str | Path) -> list[Path]:
        """The student's files."""
        return sorted(p for p in self._folder(model).glob("*") if p.is_file()) if self.steps else []

    def demands(self) -> dict[str, float]:
        """The student's number of steps, and one branch: guidance is built in."""
        if not self.steps:
            return {}
        return {"steps": read_student(Path(self.student)).steps if self.student else self.steps, "guidance": 1.0}

    def forecast(self, model: nn.Module, family: ModuleType, latents: Tensor, count: int, guided: bool) -> int:
        """The weights that wait while the student's are in their place; for an adapter, the adapter."""
        file = Path(self.student) / ADAPTER
        if self.student and file.is_file():
            return file.stat().st_size
        return sum(p.numel() * p.element_size() for p in model.parameters()) if self.steps else 0

    def _folder(self, model: str | Path) -> Path:
        return Path(self.student) if self.student else _beside(model, self.steps)

    @contextmanager
    def apply(self, host: Host, trace: Trace) -> Iterator[None]:
        """The student's weights and levels in the pipeline for the time of the context."""
        if not self.steps:
            yield
            return
        folder = self._folder(host.pipe.name_or_path or "nowhere")
        held = self.forecast(host.models[0], host.family, torch.empty(0), self.steps, False)

        def hold() -> None:
            trace.bytes_forecast += held
            trace.hold("gpd", held)

        told = host.per_run(hold)
        student = load_student(folder, host.pipe)

        def call(inner: Callable, x: Tensor, **inputs) -> Tensor:
            if host.family.is_guided(host.pipe):
                raise ValueError("a student has guidance built in, more of it burns the colours: set guidance to 1")
            told()
            return inner(x, **inputs)

        scheduler = host.pipe.scheduler
        with _placed(folder, host.models[0]), host.wrap_denoiser(call), _no_negative(host.pipe):
            host.pipe.scheduler = Grid(tuple(student.levels), tuple(student.times))
            try:
                yield
            finally:
                host.pipe.scheduler = scheduler


def _beside(model: str | Path, steps: int) -> Path:
    """The folder of a model's student of so many steps."""
    return Path(model) / f"gpd-N{steps}"


def _placed(folder: Path, module: nn.Module) -> AbstractContextManager:
    """A context in which the student's weights are the module's."""
    if (folder / ADAPTER).is_file():
        return adapted(module, folder)
    return replaced(module, load_differences(module, folder / "model.safetensors"))


@contextmanager
def _no_negative(pipe) -> Iterator[None]:
    """Inside, a negative prompt is refused: the stock pipeline would drop it without a word, as it runs one branch."""
    before, encode = vars(pipe).get("encode_prompt"), pipe.encode_prompt
    signature = inspect.signature(encode)

    def refuse(*args, **given):
        asked = signature.bind(*args, **given).arguments
        texts = asked.get("negative_prompt") or ""
        given_one = any([texts] if isinstance(texts, str) else texts) or asked.get("negative_prompt_embeds") is not None
        if given_one and not asked.get("do_classifier_free_guidance", True):  # with guidance the run is refused anyway
            raise ValueError("a student has no unconditional branch for a negative prompt to act in: leave it out")
        return encode(*args, **given)

    pipe.encode_prompt = refuse
    try:
        yield
    finally:
        del pipe.encode_prompt
        if before is not None:
            pipe.encode_prompt = before


def read_student(folder: Path) -> Student:
    """What is known of the student in a folder. Raises ValueError if there is none."""
    file = folder / "gpd.json"
    if not file.is_file():
        others = sorted(p.name for p in folder.parent.glob("gpd-N*")) or ["none: python -m accel train gpd makes them"]
        raise ValueError(
            f"there is no student {folder.name!r} in that place (gpd.student names another); "
            f"there are {', '.join(others)}"
        )
    try:
        return Student.model_validate_json(file.read_text())
    except ValidationError as error:
        raise ValueError(f"{file} is no student: {error.errors()[0]['msg']}") from None


def load_student(folder: Path, pipe) -> Student:
    """The student in a folder, for a pipeline. Raises ValueError if there is none or it is of another base."""
    student = read_student(folder)
    if getattr(pipe, "transformer_2", None) is not None or not bears(pipe.transformer, student.base):
        raise ValueError(f"student {folder.name!r} was made from another base model: train it from this one")
    return student
