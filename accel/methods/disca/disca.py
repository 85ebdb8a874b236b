"""DisCa's feature cache (arXiv 2602.05449): full forward passes at a few steps, predictions of the blocks between.

At a full step the block stack runs and its output, one tensor, is cached. At the other steps it is skipped: the tokens
are embedded and the model's head runs, but the output of the blocks is predicted, by a small network that was trained
for a MeanFlow student (`python -m accel train predictor`). Predictions are never cached.

Ours, not the paper's: the predictor form `residual`, the form `guided-base` for a model without a student, and where
the full steps are. Two baselines need no training:
reuse of the cached output, and a Taylor series of the last few (TaylorSeer, arXiv 2503.06923).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, ClassVar, Literal, get_args

from pydantic import Field, model_validator

from ...core.trace import DENOISER, Trace
from ...errors import AccelError
from ...students.manifest import load_manifest
from ..base import (
    Choices,
    FullStepRun,
    FullSteps,
    Method,
    RunSpec,
    model_path,
    outside_blocks,
    record_prediction,
    report_estimate,
    run_spec,
)
from .predictor_manifest import DEPTH, PredictorForm, PredictorManifest, PredictorRuns, predictor_flops

if TYPE_CHECKING:
    from torch import Tensor

    from ...core.host import Host
    from .predictor import Predictor

TRAINED = get_args(PredictorForm)
TAYLOR_ORDER = {"reuse": 0, "taylor-1": 1, "taylor-2": 2}  # of the predictors that need no training
MANIFEST = "predictor.json"


@dataclass
class State(FullStepRun):
    """What one run has decided."""

    predicted_share: float = 1.0  # of a full pass's FLOPs, that a predicted one took


class DisCa(Method):
    """Predicts the output of all blocks between full steps, by a small network or a series; made for `meanflow`."""

    title: ClassVar[str] = "DisCa"
    paper: ClassVar[str] = "arXiv 2602.05449"
    neutral: ClassVar[dict] = {"num_full_steps": 50, "predictor": "reuse"}
    basic: ClassVar[tuple[str, ...]] = ("num_full_steps", "predictor")

    num_full_steps: int = Field(
        8, ge=2, le=50, description="Full forward passes, the others are predicted; fewer lose motion and shape."
    )
    predictor: Literal["residual", "paper", "guided-base", "reuse", "taylor-1", "taylor-2"] = Field(
        "residual",
        description="A trained network (of a student: residual, or as in the paper; of the model itself: guided-base), "
        "the cached output, or its Taylor series.",
    )
    full_steps: FullSteps = Field(
        "",
        description="Indices of the full steps, as in '0 1 2 5 9'; empty: spread evenly.",
        json_schema_extra={"page": False},
    )
    predictor_dir: str = Field(
        "", description="Folder of a predictor; empty: in the model's folder.", json_schema_extra={"page": False}
    )

    @property
    def is_neutral(self) -> bool:
        """Whether the settings say that all steps are full; a list of full steps says something else."""
        return super().is_neutral and not self.full_steps

    @model_validator(mode="after")
    def _unused_predictor_exists(self) -> DisCa:
        if self.predictor_dir and self.predictor not in TRAINED:  # one in use is checked when the method is applied
            _load_manifest(Path(self.predictor_dir))
        return self

    @classmethod
    def available_values(cls, model: str | Path) -> dict[str, Choices]:
        """The trained forms that are in the model's folder, and the forms that need no training.

        Those of a student come first, and that of the base model last: it does not run with a student.
        """
        trained = [form for form in TRAINED if (_default_dir(model, form) / MANIFEST).is_file()]
        return {"predictor": sorted(trained + [*TAYLOR_ORDER], key=lambda form: form == "guided-base")}

    def weights_dir(self, model: str | Path) -> Path | None:
        """The predictor's folder; None for a form that needs no training."""
        if self.predictor not in TRAINED:
            return None
        return Path(self.predictor_dir) if self.predictor_dir else _default_dir(model, self.predictor)

    @property
    def names_weights(self) -> bool:
        """With the folder of a predictor."""
        return bool(self.predictor_dir)

    @property
    def taylor_order(self) -> int:
        """The order of the series; a network too has the last output alone."""
        return TAYLOR_ORDER.get(self.predictor, 0)

    @property
    def predicts_blocks(self) -> bool:
        """At all but the neutral setting."""
        return not self.is_neutral

    def estimate_memory(self, spec: RunSpec) -> int:
        """Bytes of the predictor and, for each branch, of a cached output and one more for each Taylor order."""
        from .predictor import num_parameters

        weights = num_parameters(self.weights_dir(spec.model_path)) * spec.latents.element_size()
        full = len(self.planned_steps(spec.count))
        if full == spec.count:
            return weights
        cached = min(full, 1 + self.taylor_order)
        return weights + cached * (1 + spec.guided) * spec.tokens * spec.token_bytes

    def planned_steps(self, count: int) -> list[int]:
        """The full steps of `count` steps. Raises AccelError if given ones do not end with the last step."""
        given = [int(word) for word in self.full_steps.split()]
        if given and given[-1] != count - 1:
            raise AccelError(
                f"disca.full_steps ends with step {given[-1]}, but a run of {count} steps ends with step {count - 1}, "
                "which must be full"
            )
        return given or select_full_steps(count if self.is_neutral else self.num_full_steps, count)

    def expected_work(self, spec: RunSpec, flops: dict[str, int]) -> float:
        """The full steps, and in the others the embedding, the head and the predictor."""
        left = outside_blocks(spec.family, spec.model, flops)
        if self.predictor in TRAINED:
            block, width = flops[spec.family.block_names(spec.model)[0]], spec.family.hidden_size(spec.model)
            left += predictor_flops(self.predictor, DEPTH[self.predictor], spec.tokens, width, block)
        full = len(self.planned_steps(spec.count)) / spec.count
        return full + (1 - full) * min(1.0, left / flops[DENOISER])

    def inactive_reason(self, spec: RunSpec) -> str:
        """All steps are full steps."""
        if len(self.planned_steps(spec.count)) < spec.count:
            return ""
        return f"DisCa does nothing: all {spec.count} steps are full forward passes at this setting"

    @contextmanager
    def apply(self, host: Host, trace: Trace) -> Iterator[None]:
        """Wrap the block stack inside the context."""
        from ...ops.taylor import TaylorCache

        predictor, runs = self._load(host) if self.predictor in TRAINED else (None, None)
        weights = sum(p.nbytes for p in predictor.parameters()) if predictor else 0
        caches = host.per_text_and_model(lambda: defaultdict(TaylorCache))  # by branch
        state = host.per_run(lambda: self._begin(host, trace, runs))
        trained_for = host.denoisers[0]

        def blocks(inner, hidden: Tensor, *inputs, **named) -> Tensor:
            step, run, cache = host.step, state(), caches()[host.step.branch]
            if predictor is not None:
                host.check_denoiser(trained_for, f"predictor {self.predictor!r}")
            is_fresh = cache.fits(hidden) and [cache.position] == run.full_steps[-1:]
            if run.step != step.index:
                run.step = step.index
                if step.index in run.planned or step.index in host.exact_steps or not is_fresh:
                    run.full_steps.append(step.index)
            if not run.is_full and is_fresh:
                run.predicted_share = record_prediction(host, trace, self._predictor_flops(host, predictor, hidden))
                if predictor is None:
                    return cache.extrapolate(step.index).to(hidden.dtype)
                predictor.to(hidden)  # the model is offloaded between runs, or converted
                gap = hidden.new_full((len(hidden),), trace.sigmas[cache.position] - step.sigma)
                return predictor(hidden, cache.terms[0], gap, *inputs, **named)
            if step.index == step.count - 1:
                self._report_speedup(trace, run)
            out = inner(hidden, *inputs, **named)
            if step.index == step.count - 1:
                caches().clear()  # also of a branch that ended before: they would take memory while decoding
            elif len(run.planned) < step.count:
                cache.refresh(step.index, out, self.taylor_order)
                trace.set_memory("disca", weights + sum(c.nbytes for c in caches().values()))
            return out

        with host.wrap_blocks(blocks):
            yield

    def _begin(self, host: Host, trace: Trace, runs: PredictorRuns | None) -> State:
        """The state of a new run. Messages and the memory estimate go to the trace."""
        spec = run_spec(host)
        count, state = spec.count, State(self.planned_steps(spec.count))
        if count == 1:
            raise AccelError("disca and a run of 1 step do not go together: there is nothing to predict")
        if inactive_reason := self.inactive_reason(spec):
            trace.add_message(inactive_reason)
        gap = max_gap(state.planned)
        if runs and 1 < gap and gap > runs.supported_runs.get(count, 0):
            trained = " or ".join(
                f"{n} steps, full steps up to {most} apart" for n, most in runs.supported_runs.items()
            )
            trace.add_message(
                f"DisCa: this predictor was trained for runs of {trained}; this run has {count}, up to {gap} apart"
            )
        report_estimate(self, spec, trace)
        trace.method_data["disca"] = {"full_steps": state.full_steps}
        return state

    def _predictor_flops(self, host: Host, predictor: Predictor | None, hidden: Tensor) -> int:
        """FLOPs of one call of the predictor; 0 for a series."""
        if predictor is None:
            return 0
        block = host.trace.flops[host.family.block_names(host.denoisers[host.active_index])[0]]
        tokens, width = hidden.shape[0] * hidden.shape[1], hidden.shape[2]
        return predictor_flops(self.predictor, len(predictor.blocks), tokens, width, block)

    def _report_speedup(self, trace: Trace, run: State) -> None:
        """Report, at the last step, the speed-up over full passes only, as counted and as measured so far."""
        inner = [i for i in trace.milliseconds if 0 < i < len(trace.sigmas) - 1]  # the first step may be a warm-up
        times = [[trace.milliseconds[i] for i in inner if (i in run.full_steps) == full] for full in (True, False)]
        if not all(times):
            return
        count, full = len(trace.sigmas), len(run.full_steps)
        time_share = median(times[1]) / median(times[0])
        counted, measured = (count / (full + (count - full) * cost) for cost in (run.predicted_share, time_share))
        trace.add_message(
            f"DisCa: {full} of {count} forward passes are full; a predicted one took {time_share:.0%} "
            f"of a full one, {run.predicted_share:.0%} by count: {measured:.2f} times as fast as full passes only, "
            f"{counted:.2f} by count"
        )

    def _load(self, host: Host) -> tuple[Predictor, PredictorRuns]:
        """The trained predictor and its runs. Raises AccelError if there is none, or not for this model and form."""
        from ...students.weights import matches_fingerprint
        from .predictor import load_predictor

        if len(host.denoisers) > 1:
            raise AccelError(
                f"disca.predictor = {self.predictor} is of one transformer, and this pipeline has "
                f"{len(host.denoisers)}: choose reuse or taylor-1"
            )
        weights_dir, model = self.weights_dir(model_path(host)), host.denoisers[0]
        manifest = _load_manifest(weights_dir)
        if not matches_fingerprint(model, manifest.student_fingerprint):
            remedy = "put the meanflow that it was trained for before disca"
            if manifest.form == "guided-base":
                remedy = "run the model that it was trained for, without a student"
            raise AccelError(
                f"disca: predictor {weights_dir.name!r} belongs to another model than the one that runs: {remedy}, or "
                "choose the predictor reuse or taylor-1"
            )
        if manifest.form != self.predictor:
            raise AccelError(
                f"disca.predictor = {self.predictor}, but the predictor in {weights_dir.name!r} "
                f"has the form {manifest.form}"
            )
        return load_predictor(weights_dir, manifest, host.family, model), manifest.config


def _load_manifest(folder: Path) -> PredictorManifest:
    return load_manifest(folder, MANIFEST, PredictorManifest, "disca.predictor_dir", "train predictor")


def _default_dir(model: str | Path, form: str) -> Path:
    """The folder of a model's predictor of that form."""
    return Path(model) / "predictor" / form


def max_gap(full_steps: list[int]) -> int:
    """Most steps from one full step to the next."""
    return max(after - before for before, after in pairwise(full_steps))


def select_full_steps(num_full_steps: int, count: int) -> list[int]:
    """The full steps of `count` steps: the first three, the last, and the others spread evenly between."""
    if num_full_steps >= count:
        return list(range(count))
    if num_full_steps < 4:
        return [*range(num_full_steps - 1), count - 1]
    parts = num_full_steps - 3
    return [0, 1, *(2 + round((count - 3) * i / parts) for i in range(parts + 1))]
