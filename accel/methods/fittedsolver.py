"""Fitted solver: a few steps, each a weighted sum that was fitted to the trajectories of many steps.

Ours, from published ideas. A solver with its own weights in every step is called non-stationary; those of Shaul et al.
(BNS, arXiv 2403.01329) are trained through the model. Here each step's weights are the solution of one least-squares
problem, over trajectories of the baseline for a few prompts (`python -m accel fit`), so nothing is trained and the
model stays as it is. They lie in the model's folder, `fittedsolver/8.json` for 8 steps.

The next sample is a sum of the present one and of all outputs so far: of the conditional and of the unconditional
branch, each with its own weight. So guidance is part of the fit, and steps may leave out the unconditional branch.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, get_args

from pydantic import BaseModel, Field, model_validator

from ..core.trace import DENOISER, Trace
from ..errors import AccelError
from ..files import read_model
from .base import Choices, Method, RunSpec, model_path, report_estimate, run_spec

if TYPE_CHECKING:
    from torch import Tensor

    from ..core.host import Host

FOLDER = "fittedsolver"


class Solver(BaseModel, frozen=True):
    """A fitted solver of k steps, as its file holds it."""

    steps: int = Field(ge=1)
    guidance: float  # of the baseline that it was fitted to
    sigmas: list[float]  # k + 1, the last one 0
    timesteps: list[float]  # k
    uncond_steps: list[int]  # those that run the unconditional branch; empty for a model without one
    weights: list[list[float]]  # of each step: of the sample, then of all outputs so far, cond before uncond
    base_fingerprint: list[float]  # of the transformer that it was fitted to

    @model_validator(mode="after")
    def _has_one_weight_for_each_output(self) -> Solver:
        if len(self.timesteps) != self.steps or len(self.sigmas) != self.steps + 1:
            raise ValueError(f"a solver of {self.steps} steps needs as many timesteps, and one more sigma")
        if [len(row) for row in self.weights] != [1 + self.num_outputs(step) for step in range(self.steps)]:
            raise ValueError("each step needs one weight for the sample and one for each output so far")
        if not all(map(math.isfinite, chain(*self.weights))):
            raise ValueError("a weight is not a finite number")
        return self

    def num_outputs(self, step: int) -> int:
        """How many outputs of the model there are after a step."""
        return step + 1 + sum(uncond <= step for uncond in self.uncond_steps)

    def next_sample(self, step: int, sample: Tensor, outputs: list[Tensor]) -> Tensor:
        """The sample after a step, in float32, from the one before it and all outputs so far, of the same shape."""
        return weighted_sum(self.weights[step], [sample, *outputs])


def weighted_sum(weights: list[float], terms: list[Tensor]) -> Tensor:
    """The sum of terms of one shape, each times its weight, in float32."""
    x = weights[0] * terms[0].float()
    for weight, term in zip(weights[1:], terms[1:], strict=True):
        x += weight * term.float()
    return x


class FittedSolver(Method):
    """Samples in a few steps with weights that were fitted to the baseline's trajectories."""

    title: ClassVar[str] = "Fitted solver"
    paper: ClassVar[str] = ""
    neutral: ClassVar[dict] = {"steps": 0}
    basic: ClassVar[tuple[str, ...]] = ("steps",)

    steps: Literal[0, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 25, 33] = Field(
        10, description="Steps of the solver (0: the model's own solver); fewer lose fine detail first."
    )
    solver: str = Field(
        "", description="File of a solver; empty: the one in the model's folder.", json_schema_extra={"page": False}
    )

    @property
    def names_weights(self) -> bool:
        """With the file of a solver."""
        return bool(self.solver)

    @classmethod
    def available_values(cls, model: str | Path) -> dict[str, Choices]:
        """The step counts of the solvers in a model's folder."""
        counts = get_args(cls.model_fields["steps"].annotation)
        found = [n for n in counts if (Path(model) / FOLDER / f"{n}.json").is_file()]
        return {"steps": [0, *found] if found else []}

    def file(self, model: str | Path) -> Path:
        """The solver's file."""
        return Path(self.solver) if self.solver else Path(model) / FOLDER / f"{self.steps}.json"

    def is_available(self, model: str | Path) -> bool:
        """Whether the solver's file is there."""
        return not self.steps or self.file(model).is_file()

    def files(self, model: str | Path) -> list[Path]:
        """The solver's file, if there is one."""
        return [self.file(model)] if self.steps and self.is_available(model) else []

    def load(self, model: str | Path) -> Solver:
        """The solver for a model. Raises AccelError if there is none or its file is not valid."""
        file = self.file(model)
        if not os.path.isfile(file):  # false for what cannot be a path, too
            raise AccelError(f"there is no solver of {self.steps} steps at {file}: `python -m accel fit` makes one")
        solver = read_model(Solver, file, "fitted solver")
        if solver.steps != self.steps:
            raise AccelError(f"{file} is a solver of {solver.steps} steps: set fittedsolver.steps to {solver.steps}")
        return solver

    def required_settings(self) -> dict[str, float]:
        """The solver's number of steps."""
        return {"steps": self.steps} if self.steps else {}

    def expected_work(self, spec: RunSpec, flops: dict[str, int]) -> float:
        """The share of the calls that run: the solver may leave out unconditional ones."""
        if not self.steps or not spec.guided:
            return 1.0
        return self.load(spec.model_path).num_outputs(self.steps - 1) / (2 * self.steps)

    def estimate_memory(self, spec: RunSpec) -> int:
        """Bytes of all outputs of a run, in the model's dtype."""
        if not self.steps:
            return 0
        outputs = self.load(spec.model_path).num_outputs(self.steps - 1)
        return outputs * spec.latents.numel() * spec.latents.element_size()

    @contextmanager
    def apply(self, host: Host, trace: Trace) -> Iterator[None]:
        """Inside the context, the pipeline samples with the solver, and each call keeps its output."""
        if not self.steps:
            yield
            return
        from ..students.euler_scheduler import CombiningScheduler, is_student_run, use_scheduler
        from ..students.weights import matches_fingerprint

        pipe, solver = host.pipe, self.load(model_path(host))
        if is_student_run(pipe):
            raise AccelError("a fitted solver and a student do not go together: each brings its own noise levels")
        if len(host.denoisers) > 1 or not matches_fingerprint(host.denoisers[0], solver.base_fingerprint):
            raise AccelError(f"the solver of {self.steps} steps was fitted to another model: python -m accel fit")
        outputs, model = host.per_run(list), host.denoisers[0]
        begin = host.per_run(lambda: report_estimate(self, run_spec(host), trace))

        def call(inner: Callable[..., Tensor], x: Tensor, **inputs) -> Tensor:
            host.check_denoiser(model, "a fitted solver")
            self._check_call(solver, host, scheduler)
            begin()
            kept = outputs()
            if host.step.branch == "uncond" and host.step.index not in solver.uncond_steps and kept:
                trace.record(host.step, DENOISER, "rebuild")
                return host.family.to_video(kept[-1], host.grid)  # of no effect: the next sample comes from `kept`
            y = inner(x, **inputs)
            kept.append(host.family.from_video(y))
            trace.set_memory("fittedsolver", sum(output.nbytes for output in kept))
            return y

        def combine(step: int, sample: Tensor) -> Tensor:
            kept = outputs()
            if len(kept) != solver.num_outputs(step):
                raise AccelError(
                    "a fitted solver needs an output of every call: list it after methods that skip calls, and begin "
                    "at the first step"
                )
            if kept[0].shape != sample.shape:
                raise AccelError("a fitted solver needs samples that have the shape of the model's output")
            return solver.next_sample(step, sample, kept)

        scheduler = CombiningScheduler(solver.sigmas, solver.timesteps, combine)
        with host.wrap_denoiser(call), use_scheduler(pipe, scheduler):
            yield

    def check(self, spec: RunSpec) -> None:
        """Raise AccelError if there is no solver, or for guidance that it was not fitted to."""
        self._check_guidance(self.load(spec.model_path), spec.guidance)

    def _check_guidance(self, solver: Solver, guidance: float | None) -> None:
        if guidance is not None and abs(guidance - solver.guidance) > 1e-6:
            raise AccelError(
                f"the solver of {self.steps} steps was fitted to guidance {solver.guidance:g}, not {guidance:g}: set "
                f"guidance to {solver.guidance:g}, or fit another one"
            )

    def _check_call(self, solver: Solver, host: Host, scheduler) -> None:
        """Raise AccelError where the running pipeline would not do what was fitted."""
        from ..core.calls import running_call

        running, call = running_call(host.pipe)
        if running.scheduler is not scheduler:
            raise AccelError("a fitted solver brings its own scheduler: keep it, and run the same pipeline")
        self._check_guidance(solver, getattr(running, "guidance_scale", None))
        if host.is_guided != bool(solver.uncond_steps):
            found, fitted = ("an", "without one") if host.is_guided else ("no", "with one")
            raise AccelError(f"this run has {found} unconditional branch, and the solver was fitted {fitted}")
        if call.get("guidance_rescale"):
            raise AccelError("guidance_rescale is not possible with a fitted solver: its steps leave it out")
