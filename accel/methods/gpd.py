"""GPD (Liang et al., arXiv 2602.01814): a student that follows the trajectory of 48 guided steps in 6 calls.

It skips steps and the unconditional branch. Students are distilled beforehand (`python -m accel train gpd`), one for
each number of steps, and lie in the model's folder: weights, and `gpd.json` with the sigmas and timesteps they were
trained on. A student predicts the mean velocity of a whole interval, with guidance distilled in. So it runs on exactly
these sigmas, with Euler steps: a multistep solver would extrapolate mean velocities as if they were instantaneous.

Ours, not the paper's: students are stored as int8 differences from the base model, or as a LoRA.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, get_args

from pydantic import BaseModel, Field

from ..core.trace import Trace
from .base import Choices, StudentMethod, model_path

if TYPE_CHECKING:
    from ..core.host import Host


class GPDManifest(BaseModel, frozen=True):
    """The fields of `gpd.json` that a run needs."""

    steps: int = Field(ge=1)
    sigmas: Annotated[list[float], Field(min_length=2)]  # steps + 1 of them, from 1 to 0
    timesteps: Annotated[list[float], Field(min_length=1)]
    base_fingerprint: list[float]  # of the transformer that the student was trained from


class GPD(StudentMethod):
    """Replaces the denoiser by a student that was trained for exactly that many steps."""

    title: ClassVar[str] = "GPD"
    paper: ClassVar[str] = "arXiv 2602.01814"
    neutral: ClassVar[dict] = {"steps": 0}
    basic: ClassVar[tuple[str, ...]] = ("steps",)
    manifest_file: ClassVar[str] = "gpd.json"
    manifest_type: ClassVar[type[BaseModel]] = GPDManifest

    steps: Literal[0, 6, 8, 12, 16, 24, 48] = Field(
        6, description="Steps of the student (0: no student); fewer lose fine detail first."
    )

    @classmethod
    def available_values(cls, model: str | Path) -> dict[str, Choices]:
        """The step counts of the students in a model's folder."""
        counts = get_args(cls.model_fields["steps"].annotation)
        found = [n for n in counts if (_default_dir(model, n) / cls.manifest_file).is_file()]
        return {"steps": [0, *found] if found else []}

    def default_dir(self, model: str | Path) -> Path:
        """The folder of the student of that many steps."""
        return _default_dir(model, self.steps)

    def required_settings(self) -> dict[str, float]:
        """The student's number of steps, and no guidance: it is distilled in."""
        if not self.steps:
            return {}
        return {"steps": self.load_manifest(Path(self.student)).steps if self.student else self.steps, "guidance": 1.0}

    @contextmanager
    def apply(self, host: Host, trace: Trace) -> Iterator[None]:
        """Inside the context, the pipeline has the student's weights and sigmas."""
        if not self.steps:
            yield
            return
        from ..students.euler_scheduler import StudentEuler, use_scheduler
        from ..students.loading import check_base, load_student, student_run

        weights_dir = self.weights_dir(model_path(host))
        manifest = self.load_manifest(weights_dir)
        check_base(weights_dir, manifest.base_fingerprint, host.pipe)
        scheduler = StudentEuler(manifest.sigmas, manifest.timesteps)
        with load_student(weights_dir, host.denoisers[0]), student_run(host, weights_dir, "gpd"):
            with use_scheduler(host.pipe, scheduler):
                yield


def _default_dir(model: str | Path, steps: int) -> Path:
    """The folder of a model's student of so many steps."""
    return Path(model) / f"gpd-N{steps}"
