"""Restricted MeanFlow (DisCa, arXiv 2602.05449): a student without a guidance branch, for a range of step counts.

It skips the unconditional branch and steps. It is distilled beforehand (`python -m accel train meanflow`) and lies in
the model's folder as `meanflow/`. Each call gets the interval's end and the guidance scale as extra inputs and predicts
the mean velocity of that interval (MeanFlow, Geng et al., arXiv 2505.13447). So it runs with Euler steps and one
branch, on the sigmas of the pipeline's own scheduler.

Ours, not the paper's: one student takes any of the step counts and guidance scales that it was trained on.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, get_args

from pydantic import BaseModel, Field

from ..core.trace import Trace
from ..errors import AccelError
from .base import Choices, StudentMethod, model_path

if TYPE_CHECKING:
    from torch import Tensor

    from ..core.host import Host


class MeanFlowManifest(BaseModel, frozen=True):
    """The fields of `meanflow.json` that a run needs."""

    guidance: tuple[float, float]  # lowest and highest scale that the student was trained on
    max_interval: float = Field(gt=0, le=1)  # the longest interval, in sigma, that it was trained on
    base_fingerprint: list[float]  # of the transformer that it was trained from
    guidance_only: bool = False  # trained on guidance alone: intervals are passed as empty


class MeanFlow(StudentMethod):
    """Replaces the denoiser by a student that takes any of several step counts."""

    title: ClassVar[str] = "MeanFlow"
    paper: ClassVar[str] = "arXiv 2602.05449"
    neutral: ClassVar[dict] = {"steps": 0}
    basic: ClassVar[tuple[str, ...]] = ("steps",)
    manifest_file: ClassVar[str] = "meanflow.json"
    manifest_type: ClassVar[type[BaseModel]] = MeanFlowManifest

    steps: Literal[0, 4, 5, 6, 7, 8, 9, 10, 12, 15, 20, 30, 50] = Field(
        20, description="Steps of the student (0: no student); below 10 its intervals exceed its training."
    )
    guidance: float = Field(
        5.0,
        ge=1,
        le=20,
        multiple_of=0.25,
        description="Guidance scale of the student; far from the usual one is worse.",
    )

    @classmethod
    def available_values(cls, model: str | Path) -> dict[str, Choices]:
        """All step counts and the trained range of guidance, if the model's folder has a student."""
        weights_dir = Path(model) / "meanflow"
        if not (weights_dir / cls.manifest_file).is_file():
            return {"steps": []}
        counts = list(get_args(cls.model_fields["steps"].annotation))
        return {"steps": counts, "guidance": cls.load_manifest(weights_dir).guidance}

    def default_dir(self, model: str | Path) -> Path:
        """The folder of a model's only MeanFlow student."""
        return Path(model) / "meanflow"

    def required_settings(self) -> dict[str, float]:
        """The number of steps, and no guidance: it is distilled in."""
        return {"steps": self.steps, "guidance": 1.0} if self.steps else {}

    @contextmanager
    def apply(self, host: Host, trace: Trace) -> Iterator[None]:
        """Inside the context, the pipeline has the student's weights, and each call gets its interval and guidance."""
        if not self.steps:
            yield
            return
        import torch

        from ..students.euler_scheduler import StudentEuler, use_scheduler
        from ..students.interval_embedding import INTERVAL_EMBEDDER, pack_timestep, with_interval_embedder
        from ..students.loading import check_base, load_student, student_run
        from ..students.weights import read_weights

        weights_dir, model, pipe = self.weights_dir(model_path(host)), host.denoisers[0], host.pipe
        manifest = self.load_manifest(weights_dir)
        check_base(weights_dir, manifest.base_fingerprint, pipe)
        low, high = manifest.guidance
        if not low <= self.guidance <= high:
            raise AccelError(f"meanflow.guidance = {self.guidance:g}: this student was trained on {low:g} to {high:g}")
        check_intervals = host.per_run(lambda: self._check_intervals(manifest, host, trace))

        def call(inner, x: Tensor, **inputs) -> Tensor:
            check_intervals()
            if inputs["timestep"].ndim > 1 and inputs["timestep"].amin() != inputs["timestep"].amax():
                raise AccelError("meanflow knows one noise level for all tokens, and here a given frame has another")
            end = host.step.sigma if manifest.guidance_only else host.step.sigma_next
            numbers = torch.tensor((host.step.sigma, end, self.guidance), device=x.device)
            t, r, guidance = numbers.unsqueeze(1).expand(-1, len(x))
            return inner(x, **inputs | {"timestep": pack_timestep(t, r, guidance)})

        sigmas = self._sigmas(pipe.scheduler)
        scheduler = StudentEuler(sigmas, [1000 * sigma for sigma in sigmas[:-1]])
        embedder = read_weights(weights_dir / INTERVAL_EMBEDDER)
        with load_student(weights_dir, model), with_interval_embedder(model, embedder):
            with host.wrap_denoiser(call), student_run(host, weights_dir, "meanflow"), use_scheduler(pipe, scheduler):
                yield

    def _sigmas(self, scheduler) -> list[float]:
        """The noise levels of a scheduler at this number of steps, which stays as it is.

        Raises AccelError for one whose levels are not those of a flow from 1 to 0, or depend on the size.
        """
        from ..core.denoising_loop import is_flow

        own = deepcopy(scheduler)
        fits = is_flow(own) and not own.config.get("invert_sigmas") and not own.config.get("use_dynamic_shifting")
        if fits:
            own.set_timesteps(self.steps)
        if not fits or len(own.sigmas) != self.steps + 1:
            raise AccelError(
                f"meanflow cannot take its noise levels from this {type(own).__name__}: choose a "
                "UniPCMultistepScheduler with flow sigmas, or a FlowMatchEulerDiscreteScheduler of a fixed shift"
            )
        return own.sigmas.tolist()

    def _check_intervals(self, manifest: MeanFlowManifest, host: Host, trace: Trace) -> None:
        """Report, at the start of a run, intervals that are longer than in training."""
        longest = float(-host.pipe.scheduler.sigmas.diff().min())
        if longest > manifest.max_interval + 1e-3:
            trace.add_message(
                f"MeanFlow: the longest of {self.steps} intervals is {longest:.2f}, "
                f"the student was trained on up to {manifest.max_interval:.2f}"
            )
