"""GPD (Liang et al., arXiv 2602.01814): a student that goes the way of 48 guided steps in 6 calls.

Students are distilled beforehand (`python -m accel train gpd`) and lie beside their base model, a folder for each
number of steps: weights, and `gpd.json` with the noise levels and timesteps they learnt. A student's output is the
mean velocity of a whole interval with guidance built in. So it runs on exactly these levels, first order, unguided;
a multistep solver would extrapolate means as if they were slopes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, ClassVar, Literal, get_args

from pydantic import BaseModel, Field
from torch import Tensor

from ..core.host import Host
from ..core.trace import Trace
from ..students.loading import forbid_cfg, load_student, weight_bytes
from ..students.manifest import check_base, load_manifest
from ..students.scheduler import use_scheduler
from .base import Choices, StudentMethod, model_path, student_field


class Student(BaseModel, frozen=True):
    """What `gpd.json` says of a student, as far as running it goes."""

    steps: int = Field(ge=1)
    sigmas: Annotated[list[float], Field(min_length=2)]  # steps + 1 of them, from 1 to 0
    timesteps: Annotated[list[float], Field(min_length=1)]
    base_fingerprint: list[float]  # marks of the transformer it was made from


class GPD(StudentMethod):
    """Runs the student of a number of steps in place of the denoiser."""

    title: ClassVar[str] = "GPD"
    paper: ClassVar[str] = "arXiv 2602.01814"
    neutral: ClassVar[dict] = {"steps": 0}

    steps: Literal[0, 6, 8, 12, 16, 24, 48] = Field(
        6, description="Steps of the student (0: no student); fewer lose fine detail first."
    )
    student: str = student_field()

    @classmethod
    def available_values(cls, model: str | Path) -> dict[str, Choices]:
        """Step counts of the students beside a model."""
        found = [
            n for n in get_args(cls.model_fields["steps"].annotation) if (_default_dir(model, n) / "gpd.json").is_file()
        ]
        return {"steps": [0, *found] if found else []}

    def default_dir(self, model: str | Path) -> Path:
        """The student of that many steps."""
        return _default_dir(model, self.steps)

    def required_settings(self) -> dict[str, float]:
        """The student's number of steps, and one branch: guidance is built in."""
        if not self.steps:
            return {}
        return {"steps": _load_manifest(Path(self.student)).steps if self.student else self.steps, "guidance": 1.0}

    @contextmanager
    def apply(self, host: Host, trace: Trace) -> Iterator[None]:
        """The student's weights and levels in the pipeline for the time of the context."""
        if not self.steps:
            yield
            return
        weights_dir, model = self.weights_dir(model_path(host)), host.denoisers[0]
        told = host.per_run(lambda: trace.reserve_memory("gpd", weight_bytes(weights_dir, model)))

        def call(inner, x: Tensor, **inputs) -> Tensor:
            told()
            return inner(x, **inputs)

        student = _load_manifest(weights_dir)
        check_base(weights_dir, student.base_fingerprint, host.pipe)
        with load_student(weights_dir, model), host.wrap_denoiser(call), forbid_cfg(host):
            with use_scheduler(host.pipe, student.sigmas, student.timesteps):
                yield


def _default_dir(model: str | Path, steps: int) -> Path:
    """The folder of a model's student of so many steps."""
    return Path(model) / f"gpd-N{steps}"


def _load_manifest(weights_dir: Path) -> Student:
    return load_manifest(weights_dir, "gpd.json", Student, "gpd.student", "train gpd makes them")
