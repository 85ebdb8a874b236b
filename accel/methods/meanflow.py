"""Restricted MeanFlow (DisCa, arXiv 2602.05449): a student without guidance that takes any number of steps.

It is distilled beforehand (`python -m accel train meanflow`) and lies beside its base model in `meanflow/`. Each call
is told where its step ends and how strong the guidance within it is, and gives the mean velocity of that step. So steps
are first order and run in one branch, on the noise levels of the pipeline's own scheduler.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar, Literal, get_args

import torch
from pydantic import BaseModel, Field
from safetensors.torch import load_file
from torch import Tensor

from ..core.host import Host
from ..core.trace import Trace
from ..students.interval_embedding import TOLD, conditioned, packed
from ..students.loading import bytes_of, one_branch, placed
from ..students.manifest import check_base, read
from ..students.scheduler import gridded
from .base import Distilled, Offered, place_of, student_knob


class Student(BaseModel, frozen=True):
    """What `meanflow.json` says of a student, as far as running it goes."""

    guidance: tuple[float, float]  # the range it learnt
    longest: float = Field(gt=0, le=1)  # the widest interval that it learnt
    base: list[float]  # marks of the transformer it was made from
    instant: bool = False  # it learnt no intervals, guidance alone: it is told none


class MeanFlow(Distilled):
    """Runs the student in place of the denoiser, in a number of steps."""

    title: ClassVar[str] = "MeanFlow"
    paper: ClassVar[str] = "arXiv 2602.05449"
    neutral: ClassVar[dict] = {"steps": 0}

    steps: Literal[0, 4, 5, 6, 7, 8, 9, 10, 12, 15, 20, 30, 50] = Field(
        20, description="Steps of the student (0: no student); below 10 it was not made for them."
    )
    guidance: float = Field(
        4.0, ge=1, le=20, multiple_of=0.25, description="Guidance that is built in; far from the usual one is weaker."
    )
    student: str = student_knob()

    @classmethod
    def offered(cls, model: str | Path) -> dict[str, Offered]:
        """All step counts and the guidance that it learnt, if there is a student beside a model."""
        folder = Path(model) / "meanflow"
        if not (folder / "meanflow.json").is_file():
            return {"steps": []}
        return {"steps": list(get_args(cls.model_fields["steps"].annotation)), "guidance": _read(folder).guidance}

    def beside(self, model: str | Path) -> Path:
        """The one student of a model."""
        return Path(model) / "meanflow"

    def demands(self) -> dict[str, float]:
        """The number of steps, and one branch: guidance is built in."""
        return {"steps": self.steps, "guidance": 1.0} if self.steps else {}

    @contextmanager
    def apply(self, host: Host, trace: Trace) -> Iterator[None]:
        """The student's weights in the pipeline, and its calls told of intervals, for the time of the context."""
        if not self.steps:
            yield
            return
        folder, model, pipe = self.folder(place_of(host)), host.models[0], host.pipe
        student = _read(folder)
        check_base(folder, student.base, pipe)
        low, high = student.guidance
        if not low <= self.guidance <= high:
            raise ValueError(f"meanflow.guidance = {self.guidance:g}: this student learnt {low:g} to {high:g}")
        held = bytes_of(folder, model)
        told = host.per_run(lambda: self._begin(held, student, host, trace))

        def call(inner, x: Tensor, **inputs) -> Tensor:
            told()
            then = host.step.sigma if student.instant else host.step.sigma_next
            numbers = (host.step.sigma, then, self.guidance)
            now, then, guidance = torch.tensor(numbers, device=x.device).unsqueeze(1).expand(-1, len(x))
            return inner(x, **inputs | {"timestep": packed(now, then, guidance)})

        pipe.scheduler.set_timesteps(self.steps)
        levels = pipe.scheduler.sigmas.tolist()
        with placed(folder, model), conditioned(model, load_file(folder / TOLD)):
            with host.wrap_denoiser(call), one_branch(host):
                with gridded(pipe, levels, [1000 * level for level in levels[:-1]]):
                    yield

    def _begin(self, held: int, student: Student, host: Host, trace: Trace) -> None:
        trace.expect("meanflow", held)
        widest = float(-host.pipe.scheduler.sigmas.diff().min())
        if widest > student.longest + 1e-3:
            trace.note(
                f"MeanFlow: {self.steps} steps are up to {widest:.2f} wide, the student learnt {student.longest:.2f}"
            )


def _read(folder: Path) -> Student:
    return read(folder, "meanflow.json", Student, "meanflow.student", "train meanflow makes it")
