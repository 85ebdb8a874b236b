"""DisCa's feature cache (arXiv 2602.05449): whole passes only at anchor steps, a prediction of their result between.

At an anchor the stack of blocks runs, and its output is kept: one tensor. At other steps the tokens are embedded and
the model's head runs as ever, but what lies between is predicted: by a small network that was trained for the student
it serves (`python -m accel train predictor`), or, as the rivals that need no training, by the kept output itself
(reuse) or a Taylor series of the last few (TaylorSeer, arXiv 2503.06923). Predictions are never kept.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import ClassVar, Literal, get_args

import torch
from pydantic import BaseModel, Field, field_validator
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from ...core.host import Host
from ...core.trace import DENOISER, Trace
from ...students.manifest import load_manifest
from ...students.weights import matches_fingerprint
from ..base import Choices, Method, RunSpec, model_path, run_spec
from .predictor import Predictor, PredictorForm, flops

TAYLOR_ORDER = {"residual": 0, "paper": 0, "reuse": 0, "taylor-1": 1, "taylor-2": 2}
LEARNT = get_args(PredictorForm)


class PredictorRuns(BaseModel, frozen=True):
    """The runs that a predictor was made for."""

    supported_runs: dict[int, int]  # by their steps, how many of these lie from an anchor to the next at most


class PredictorManifest(BaseModel, frozen=True):
    """What `predictor.json` says of a predictor, as far as running it goes."""

    form: PredictorForm
    depth: int = Field(ge=1)
    student_fingerprint: list[float]  # marks of the transformer whose features it learnt
    config: PredictorRuns


@dataclass
class TaylorCache:
    """Of one branch: the last anchor's step, and its output with backward differences in steps, up to an order."""

    step: int = 0
    terms: list[Tensor] = field(default_factory=list)

    def refresh(self, step: int, feature: Tensor, order: int) -> None:
        """Keep an anchor's output (b, n, d) and how it differs from the one before."""
        terms, before = [feature], self.terms if self.terms and self.terms[0].shape == feature.shape else []
        for older in before[:order]:
            terms.append((terms[-1] - older) / (step - self.step))
        self.step, self.terms = step, terms

    def extrapolate(self, step: int) -> Tensor:
        """The Taylor series at a later step."""
        spec = step - self.step
        return sum(term * (spec**i / math.factorial(i)) for i, term in enumerate(self.terms))


class DisCa(Method):
    """Predicts the output of the stack of blocks between anchor steps."""

    title: ClassVar[str] = "DisCa"
    paper: ClassVar[str] = "arXiv 2602.05449"
    neutral: ClassVar[dict] = {"num_full_steps": 50, "predictor": "reuse"}

    num_full_steps: int = Field(
        8, ge=2, le=50, description="Full passes; the others are predicted. Fewer lose motion and shape."
    )
    predictor: Literal["residual", "paper", "reuse", "taylor-1", "taylor-2"] = Field(
        "residual", description="Who predicts: a network (residual or as in the paper), the last pass, a Taylor series."
    )
    full_steps: str = Field(
        "", description="Steps of the full passes, as in '0 1 2 5 9'; empty: spread.", json_schema_extra={"page": False}
    )
    predictor_dir: str = Field(
        "", description="Folder of a predictor; empty: beside the model.", json_schema_extra={"page": False}
    )

    @field_validator("full_steps")
    @classmethod
    def _rising(cls, full_steps: str) -> str:
        try:
            steps = [int(word) for word in full_steps.replace(",", " ").split()]
        except ValueError:
            raise ValueError(f"full_steps = {full_steps!r} are not whole numbers") from None
        if steps and (steps[0] != 0 or sorted(set(steps)) != steps):
            raise ValueError(f"full_steps = {full_steps!r} must rise from 0, the first step: nothing is kept before it")
        return " ".join(map(str, steps))

    @classmethod
    def available_values(cls, model: str | Path) -> dict[str, Choices]:
        """The learnt forms that are beside a model, and those that need no training."""
        there = [form for form in LEARNT if (_default_dir(model, form) / "predictor.json").is_file()]
        return {"predictor": [*there, *(form for form in TAYLOR_ORDER if form not in LEARNT)]}

    def weights_dir(self, model: str | Path) -> Path | None:
        """The predictor's."""
        return (
            (Path(self.predictor_dir) if self.predictor_dir else _default_dir(model, self.predictor))
            if self.predictor in LEARNT
            else None
        )

    def estimate_memory(self, spec: RunSpec) -> int:
        """The predictor, and for each branch an output of the stack of blocks, a Taylor series one more an order."""
        model, family, latents, count, guided, _, place = spec
        own = _numbers(self.weights_dir(place)) * latents.element_size()
        if len(self.steps(count)) == count:
            return own
        tokens = math.prod(family.grid(model, latents)) * len(latents)
        kept = min(len(self.steps(count)), 1 + TAYLOR_ORDER[self.predictor])
        return own + kept * (1 + guided) * tokens * family.hidden_size(model) * latents.element_size()

    def steps(self, count: int) -> list[int]:
        """The anchors of `count` steps. Raises ValueError unless given ones end with the last."""
        given = [int(word) for word in self.full_steps.split()]
        if given and given[-1] != count - 1:
            raise ValueError(
                f"disca.full_steps ends with step {given[-1]}, a run of {count} steps with {count - 1}: both full"
            )
        return given or select_full_steps(self.num_full_steps, count)

    @contextmanager
    def apply(self, host: Host, trace: Trace) -> Iterator[None]:
        """Wrap the stack of blocks for the time of the context."""
        predictor, lessons = self._load(host) if self.predictor in LEARNT else (None, None)
        own = sum(p.nbytes for p in predictor.parameters()) if predictor else 0
        caches, full_steps = host.per_run(dict), host.per_run(lambda: self._begin(host, trace, lessons))

        def blocks(inner, hidden: Tensor, *inputs, **named) -> Tensor:
            step, order = host.step, TAYLOR_ORDER[self.predictor]
            cache = caches().setdefault((host.active_index, step.branch), TaylorCache())
            fits = bool(cache.terms) and cache.terms[0].shape == hidden.shape
            if step.index in full_steps() or not fits:
                if step.index == step.count - 1:
                    self._sum_up(trace, full_steps())
                out = inner(hidden, *inputs, **named)
                if len(full_steps()) < step.count:
                    cache.refresh(step.index, out, order)
                    trace.set_memory("disca", own + sum(t.nbytes for c in caches().values() for t in c.terms))
                return out
            self._note(host, trace, predictor, hidden)
            if predictor is not None:
                if next(predictor.parameters()).device != hidden.device:  # of an offloaded model
                    predictor.to(hidden.device)
                return predictor(hidden, cache.terms[0], *inputs, **named)
            return cache.extrapolate(step.index).to(hidden.dtype)

        with host.wrap_blocks(blocks):
            yield

    def inactive_reason(self, spec: RunSpec) -> str:
        """Where all steps are anchors."""
        count = spec.count
        if len(self.steps(count)) < count:
            return ""
        return f"DisCa does nothing: all {count} steps are full passes at this setting"

    def _begin(self, host: Host, trace: Trace, lessons: PredictorRuns | None) -> list[int]:
        """The run's anchors; what will be held, and why nothing happens, goes to the trace."""
        spec = run_spec(host)
        count, full_steps = spec.count, self.steps(spec.count)
        if count == 1:
            raise ValueError("disca and a run of 1 step do not go together: there is nothing to predict")
        if inactive_reason := self.inactive_reason(spec):
            trace.add_message(inactive_reason)
        gap = max_gap(full_steps)
        if lessons and 1 < gap and gap > lessons.supported_runs.get(count, 0):
            learnt = " or ".join(
                f"{n} steps, full steps up to {apart} apart" for n, apart in lessons.supported_runs.items()
            )
            trace.add_message(f"DisCa: this predictor learnt runs of {learnt}; this run has {count}, up to {gap} apart")
        trace.estimated_bytes += self.estimate_memory(spec)
        trace.method_data["disca"] = {"full_steps": full_steps, "predictor": self.predictor, "share": 1.0}
        return full_steps

    def _note(self, host: Host, trace: Trace, predictor: Predictor | None, hidden: Tensor) -> None:
        """Record a predicted pass, and the share of its work that is left: embedding, head and predictor."""
        whole, stack = trace.flops[DENOISER], host.num_blocks[host.active_index]
        block = trace.flops["blocks.0"]
        left = whole - stack * block
        if predictor is not None:
            left += flops(predictor, hidden.shape[0] * hidden.shape[1], block)
        trace.method_data["disca"]["share"] = left / whole
        trace.record(host.step, DENOISER, "predict", left / whole)
        trace.discard(host.step, host.attentions[host.active_index])

    def _sum_up(self, trace: Trace, full_steps: list[int]) -> None:
        """Note at the last step how much faster than without it this is, as counted and as measured until here."""
        inner = [i for i in trace.milliseconds if 0 < i < len(trace.sigmas) - 1]  # the first step may have warmed up
        times = [[trace.milliseconds[i] for i in inner if (i in full_steps) == whole] for whole in (True, False)]
        if not all(times):
            return
        full, share = len(full_steps) / len(trace.sigmas), trace.method_data["disca"]["share"]
        took = median(times[1]) / median(times[0])
        faster = [1 / (full + (1 - full) * cost) for cost in (share, took)]
        trace.method_data["disca"] |= {"took": took, "forecast": faster[0], "measured": faster[1]}
        trace.add_message(
            f"DisCa: {len(full_steps)} of {len(trace.sigmas)} passes are whole; a predicted one took {took:.0%} of a "
            f"whole one, {share:.0%} by count: {faster[1]:.2f} times as fast as all whole, {faster[0]:.2f} by count"
        )

    def _load(self, host: Host) -> tuple[Predictor, PredictorRuns]:
        """The trained predictor, and what it learnt. Raises ValueError if there is none, or it is not for what runs."""
        weights_dir, model = self.weights_dir(model_path(host)), host.denoisers[0]
        learnt = load_manifest(
            weights_dir, "predictor.json", PredictorManifest, "disca.predictor_dir", "train predictor makes it"
        )
        if not matches_fingerprint(model, learnt.student_fingerprint):
            raise ValueError(
                f"disca: predictor {weights_dir.name!r} belongs to another model than the one that runs: put the meanflow "
                "that it was trained for before it, or choose the predictor reuse or taylor-1"
            )
        if learnt.form != self.predictor:
            raise ValueError(
                f"disca.predictor = {self.predictor}, but the predictor in {weights_dir.name!r} has the form {learnt.form}"
            )
        with torch.random.fork_rng(devices=()):  # its first weights are not the caller's business
            predictor = Predictor(host.family, model, learnt.form, learnt.depth)
        predictor.load_state_dict(load_file(weights_dir / "model.safetensors"))
        weight = model.patch_embedding.weight
        return predictor.to(weight.device, weight.dtype).eval().requires_grad_(False), learnt.config


def _numbers(weights_dir: Path | None) -> int:
    """How many weights the predictor in a folder has; 0 where there is none."""
    file = weights_dir and weights_dir / "model.safetensors"
    if not (file and file.is_file()):
        return 0
    with safe_open(file, "pt") as kept:
        return sum(math.prod(kept.get_slice(name).get_shape()) for name in kept.keys())


def _default_dir(model: str | Path, form: str) -> Path:
    """The folder of a model's predictor."""
    return Path(model) / "predictor" / form


def max_gap(full_steps: list[int]) -> int:
    """Most steps from an anchor to the next."""
    return max(after - before for before, after in pairwise(full_steps))


def select_full_steps(full: int, count: int) -> list[int]:
    """`full` of `count` steps: the first three, the last, and the others evenly between."""
    if full >= count:
        return list(range(count))
    if full < 4:
        return [*range(full - 1), count - 1]
    parts = full - 3
    return [0, 1, *(2 + round((count - 3) * i / parts) for i in range(parts + 1))]
