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
from ..students.interval_embedding import INTERVAL_EMBEDDER, pack_timestep, with_interval_embedder
from ..students.loading import forbid_cfg, load_student, weight_bytes
from ..students.manifest import check_base, load_manifest
from ..students.scheduler import use_scheduler
from .base import Choices, StudentMethod, model_path, student_field


class Student(BaseModel, frozen=True):
    """What `meanflow.json` says of a student, as far as running it goes."""

    guidance: tuple[float, float]  # the range it learnt
    max_interval: float = Field(gt=0, le=1)  # the widest interval that it learnt
    base_fingerprint: list[float]  # marks of the transformer it was made from
    guidance_only: bool = False  # it learnt no intervals, guidance alone: it is told none


class MeanFlow(StudentMethod):
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
    student: str = student_field()

    @classmethod
    def available_values(cls, model: str | Path) -> dict[str, Choices]:
        """All step counts and the guidance that it learnt, if there is a student beside a model."""
        weights_dir = Path(model) / "meanflow"
        if not (weights_dir / "meanflow.json").is_file():
            return {"steps": []}
        return {
            "steps": list(get_args(cls.model_fields["steps"].annotation)),
            "guidance": _load_manifest(weights_dir).guidance,
        }

    def default_dir(self, model: str | Path) -> Path:
        """The one student of a model."""
        return Path(model) / "meanflow"

    def required_settings(self) -> dict[str, float]:
        """The number of steps, and one branch: guidance is built in."""
        return {"steps": self.steps, "guidance": 1.0} if self.steps else {}

    @contextmanager
    def apply(self, host: Host, trace: Trace) -> Iterator[None]:
        """The student's weights in the pipeline, and its calls told of intervals, for the time of the context."""
        if not self.steps:
            yield
            return
        weights_dir, model, pipe = self.weights_dir(model_path(host)), host.denoisers[0], host.pipe
        student = _load_manifest(weights_dir)
        check_base(weights_dir, student.base_fingerprint, pipe)
        low, high = student.guidance
        if not low <= self.guidance <= high:
            raise ValueError(f"meanflow.guidance = {self.guidance:g}: this student learnt {low:g} to {high:g}")
        held = weight_bytes(weights_dir, model)
        told = host.per_run(lambda: self._begin(held, student, host, trace))

        def call(inner, x: Tensor, **inputs) -> Tensor:
            told()
            then = host.step.sigma if student.guidance_only else host.step.sigma_next
            numbers = (host.step.sigma, then, self.guidance)
            now, then, guidance = torch.tensor(numbers, device=x.device).unsqueeze(1).expand(-1, len(x))
            return inner(x, **inputs | {"timestep": pack_timestep(now, then, guidance)})

        pipe.scheduler.set_timesteps(self.steps)
        sigmas = pipe.scheduler.sigmas.tolist()
        with (
            load_student(weights_dir, model),
            with_interval_embedder(model, load_file(weights_dir / INTERVAL_EMBEDDER)),
        ):
            with host.wrap_denoiser(call), forbid_cfg(host):
                with use_scheduler(pipe, sigmas, [1000 * sigma for sigma in sigmas[:-1]]):
                    yield

    def _begin(self, held: int, student: Student, host: Host, trace: Trace) -> None:
        trace.reserve_memory("meanflow", held)
        widest = float(-host.pipe.scheduler.sigmas.diff().min())
        if widest > student.max_interval + 1e-3:
            trace.add_message(
                f"MeanFlow: {self.steps} steps are up to {widest:.2f} wide, the student learnt {student.max_interval:.2f}"
            )


def _load_manifest(weights_dir: Path) -> Student:
    return load_manifest(weights_dir, "meanflow.json", Student, "meanflow.student", "train meanflow makes it")
