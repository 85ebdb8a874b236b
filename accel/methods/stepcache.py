"""StepCache: full forward passes at a few steps; at the others the residual of the block stack is extrapolated.

Ours, without training, from published ideas. What is cached is the residual, output minus input of all blocks, as in
TeaCache (arXiv 2411.19108); it is extrapolated by a Taylor series, as in TaylorSeer (arXiv 2503.06923). A full pass
runs at given steps, or where the denoised input has changed enough since the last one, as in SeaCache
(arXiv 2602.18993), here measured on the latents.

New: the series runs in the log signal-to-noise ratio instead of the step index, and only so far as it would have been
right at the last full pass, since a line overshoots and reuse falls behind; all branches of a step are full or none is;
and a corrector takes the solver's steps again once the next full pass is known.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from ..core.trace import DENOISER, Trace
from ..ops.noise import MAX_LOG_SNR, log_snr
from .base import (
    MIN_CACHED_STEPS,
    FullStepRun,
    FullSteps,
    Method,
    RunSpec,
    outside_blocks,
    record_prediction,
    report_estimate,
    run_spec,
    too_few_steps,
)

if TYPE_CHECKING:
    from torch import Tensor

    from ..core.host import Host

FIRST_SHARE = 0.5  # of the trend that continues, before it is known how much of it would have been right
CAUTION = 0.8  # of what would have been right: guidance multiplies the difference of the branches, and its errors
# Weight of the newest change in the trend, the rest is of the trend before. With 1, each correction of the latents is
# taken for a trend, and the next one has to take it back: on some prompts they grow from step to step.
NEWEST = 0.7
CROWDING = 2  # full step i of n is at (i / n) ** CROWDING of the run


@dataclass
class State(FullStepRun):
    """What one run has decided."""

    changes: list[float] = field(default_factory=list)  # relative change of the input in each step but the first
    accumulated: float = 0.0  # change since the last full step
    position: float = 0.0  # of the last full step
    clean: Tensor | None = None  # (b, c, f, h, w), the estimated signal in the last step's latents
    is_guided: bool = False  # in the last step that was decided
    shares: dict[tuple[int, str], Tensor] = field(default_factory=dict)
    # (b, 1, 1), how far the trend continues, by transformer and branch


class StepCache(Method):
    """Extrapolates the residual of all blocks between full forward passes, and corrects these steps at the next one."""

    title: ClassVar[str] = "StepCache"
    paper: ClassVar[str] = ""
    neutral: ClassVar[dict] = {"schedule": "spread", "full_share": 1.0, "full_steps": ""}
    basic: ClassVar[tuple[str, ...]] = ("schedule", "threshold", "full_share")

    schedule: Literal["change", "spread"] = Field(
        "change", description="Full passes where the input has changed enough, or spread, densest at the beginning."
    )
    threshold: float = Field(
        0.2,
        ge=0,
        le=2,
        multiple_of=0.01,
        description="Change of the clean estimate, added up, that makes a pass full; more loses shape.",
    )
    full_share: float = Field(
        0.4, ge=0.06, le=1, multiple_of=0.01, description="Share of full passes if they are spread; fewer lose shape."
    )
    corrector: bool = Field(
        True, description="Take the solver's steps again once the next full pass is known; no visible cost."
    )
    full_steps: FullSteps = Field(
        "",
        description="Indices of full steps of a run, as in '0 1 2 5 9', scaled to other step counts; empty: schedule.",
        json_schema_extra={"page": False},
    )

    def planned_steps(self, count: int) -> list[int] | None:
        """The full steps of `count` steps, the first two and the last among them; None: they depend on the video."""
        if count < MIN_CACHED_STEPS:
            return list(range(count))
        if given := [int(word) for word in self.full_steps.split()]:
            last = max(1, given[-1])
            return sorted({0, 1, count - 1, *(round(step * (count - 1) / last) for step in given)})
        return spread_steps(max(3, round(self.full_share * count)), count) if self.schedule == "spread" else None

    @property
    def predicts_blocks(self) -> bool:
        """At all but the neutral setting."""
        return not self.is_neutral

    def estimate_memory(self, spec: RunSpec) -> int:
        """Bytes of each branch's cached residuals, the corrector's latents, and those (float32) whose change counts."""
        full = self.planned_steps(spec.count)
        if full and len(full) == spec.count:
            return 0
        tensors = 2 * (1 + spec.guided)
        residuals = tensors * spec.tokens * spec.token_bytes
        return residuals + self._kept_bytes(spec.latents) + (0 if full else 4 * spec.latents.numel())

    def _kept_bytes(self, latents: Tensor) -> int:
        """What the corrector keeps: sample and output of the last full pass, and the sample after the last step."""
        return 3 * latents.nbytes if self.corrector else 0

    def expected_work(self, spec: RunSpec, flops: dict[str, int]) -> float | None:
        """The full steps, and in the others the embedding and the head; None where the steps depend on the video."""
        full = self.planned_steps(spec.count)
        if full is None:
            return None
        share = len(full) / spec.count
        return share + (1 - share) * outside_blocks(spec.family, spec.model, flops) / flops[DENOISER]

    def inactive_reason(self, spec: RunSpec) -> str:
        """Too few steps, or all of them are full steps."""
        if reason := too_few_steps(StepCache, spec.count):
            return reason
        if self.planned_steps(spec.count) == list(range(spec.count)):
            return f"StepCache does nothing: all {spec.count} steps are full forward passes at this setting"
        return ""

    @contextmanager
    def apply(self, host: Host, trace: Trace) -> Iterator[None]:
        """Wrap the block stack inside the context."""
        from ..core.corrector import corrected
        from ..ops.taylor import TaylorCache

        caches = host.per_text_and_model(lambda: defaultdict(TaylorCache))  # by branch
        state = host.per_run(lambda: self._begin(host, trace, follow_solver))

        def blocks(inner: Callable[..., Tensor], hidden: Tensor, *inputs, **named) -> Tensor:
            step, run, cache = host.step, state(), caches()[host.step.branch]
            source = host.active_index, step.branch
            position = log_snr(host.signal, step.sigma)
            is_fresh = cache.fits(hidden) and cache.position == run.position
            if run.step != step.index:
                self._decide(host, trace, run, is_fresh)
            if not run.is_full and is_fresh:
                record_prediction(host, trace)
                return hidden + cache.extrapolate(position, run.shares.get(source, FIRST_SHARE))
            out = inner(hidden, *inputs, **named)
            if step.index == step.count - 1:
                caches().clear()  # also of a branch that ended before: it would take memory while the video is decoded
                run.clean = None
            elif run.planned != list(range(step.count)):
                share = cache.best_share(position, out - hidden)
                if share is not None:
                    run.shares[source] = (CAUTION * share).clamp(0, 1)
                is_exact = abs(cache.position) < MAX_LOG_SNR  # a difference to a limited position has no length
                cache.refresh(position, out - hidden, 1 if is_exact else 0, NEWEST)
                clean = run.clean.nbytes if run.clean is not None else 0
                kept = self._kept_bytes(host.latents) + clean
                trace.set_memory("stepcache", kept + sum(c.nbytes for c in caches().values()))
            return out

        correction = corrected(host, lambda: state().is_full) if self.corrector else nullcontext(lambda: None)
        with correction as follow_solver, host.wrap_blocks(blocks):
            yield

    def _begin(self, host: Host, trace: Trace, follow_solver: Callable[[], None]) -> State:
        """The state of a new run. Messages and the memory estimate go to the trace."""
        follow_solver()
        spec = run_spec(host)
        if inactive_reason := self.inactive_reason(spec):
            trace.add_message(inactive_reason)
        report_estimate(self, spec, trace)
        state = State(self.planned_steps(spec.count))
        trace.method_data["stepcache"] = {"full_steps": state.full_steps, "changes": state.changes}
        return state

    def _decide(self, host: Host, trace: Trace, run: State, is_fresh: bool) -> None:
        """Decide, in the first branch of a step, whether all branches run in full."""
        step = host.step
        run.step = step.index
        is_due = self._has_changed(host, run) if run.planned is None else step.index in run.planned
        is_edge = step.index < 2 or step.index == step.count - 1
        has_turned = host.is_guided != run.is_guided  # some guiders are on for a part of the steps
        run.is_guided = host.is_guided
        if is_due or is_edge or has_turned or not is_fresh or step.index in host.exact_steps:
            run.full_steps.append(step.index)
            run.accumulated, run.position = 0.0, log_snr(host.signal, step.sigma)
        if run.planned is None and step.index == step.count - 1:
            self._report_threshold(trace, run)

    def _has_changed(self, host: Host, run: State) -> bool:
        """Whether the signal in the latents has changed by the threshold since the last full step."""
        from ..ops.spectrum import estimate_signal

        before, latents = run.clean, host.family.to_video(host.latents, host.grid)
        channels = host.family.out_channels(host.denoisers[host.active_index])
        latents = latents[:, :channels]  # behind those of the video, a given image may have some that stay as they are
        is_flat = host.grid[:2] == (1, 1)  # a family that does not know its grid
        run.clean = latents.float() if is_flat else estimate_signal(latents, host.signal, host.step.sigma)
        if before is not None:
            size = lambda x: x.abs().flatten(1).mean(1)
            run.changes.append(float((size(run.clean - before) / size(before)).max()))  # of samples, the liveliest
            run.accumulated += run.changes[-1]
        return run.accumulated >= self.threshold

    def _report_threshold(self, trace: Trace, run: State) -> None:
        """Say so if the threshold is below or above all that can happen."""
        changes, count = run.changes[1:-1], len(run.changes) + 1  # the first two steps and the last are always full
        if len(run.full_steps) == count:
            trace.add_message(
                f"StepCache did nothing: its threshold {self.threshold:g} is not above the smallest change in a step, "
                f"{min(changes):.2g}"
            )
        elif sum(changes) < self.threshold:
            trace.add_message(
                f"StepCache predicted every step that it may: its threshold {self.threshold:g} is above the sum of all "
                f"changes, {sum(changes):.2g}"
            )


def spread_steps(num_full_steps: int, count: int) -> list[int]:
    """Full steps of `count` steps: the first two, the last, and the others between, ever further apart."""
    last = num_full_steps - 2
    return [0, *(1 + max(i, round((count - 2) * (i / last) ** CROWDING)) for i in range(last + 1))]
