"""FasterCache (Lv et al., arXiv 2410.19355): reuse attention outputs, rebuild the unconditional branch.

Dynamic feature reuse skips self-attentions: on some steps their output is extrapolated from their last two computed
outputs (eq. 5). CFG-Cache skips the unconditional branch: on some steps its output is the conditional one plus the
low- and high-frequency parts of their last difference (the CFG delta), each with its own gain (eq. 6-11).

Ours, not the paper's: a step that runs both branches also computes their attention. Otherwise the CFG delta is taken
between extrapolated features, and the errors of both parts multiply. The weight of the extrapolation may follow sigma
or the log signal-to-noise ratio instead of the step index. And in place of each attention's output, the residual of the
whole stack of blocks may be extrapolated, which is one tensor and skips the rest of the blocks too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple

from pydantic import Field

from ..core.trace import DENOISER, Step, Trace
from ..ops.noise import log_snr
from .base import (
    MIN_CACHED_STEPS,
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
    from ..ops.storage import Stored

STACK = "blocks"  # the layer under whose name the residual of all blocks is cached


@dataclass(frozen=True)
class StepPlan:
    """What one step computes."""

    attention: bool  # False: attention outputs, or the residual of the blocks, are extrapolated
    guidance: bool  # True: both branches run; False: the unconditional output is rebuilt


@dataclass(frozen=True)
class CFGDelta:
    """Unconditional minus conditional output (b, c, f, h, w) of the last full step, float32, in two bands."""

    step: int  # of the outputs
    low: Tensor
    high: Tensor


class Computed(NamedTuple):
    """An output that a layer has computed."""

    step: int
    position: float
    output: Stored


@dataclass
class State:
    """What is cached of one text and transformer."""

    outputs: dict[tuple[str, str], list[Computed]] = field(default_factory=dict)
    # the last two computations, by (layer, branch)
    cfg_delta: CFGDelta | None = None
    cond: Tensor | None = None  # the last conditional output
    since_full: int = 0  # rebuilt steps since the last full one

    def nbytes(self) -> int:
        """Bytes of all cached tensors on the model's device."""
        tensors: list[Tensor | Stored] = [e.output for entries in self.outputs.values() for e in entries]
        tensors += [self.cfg_delta.low, self.cfg_delta.high] if self.cfg_delta else []
        tensors += [self.cond] if self.cond is not None else []
        return sum(t.nbytes for t in tensors)


class FasterCache(Method):
    """Extrapolates self-attention outputs, and estimates the unconditional branch from its last computed output."""

    title: ClassVar[str] = "FasterCache"
    paper: ClassVar[str] = "arXiv 2410.19355"
    neutral: ClassVar[dict] = {"attention": False, "guidance": False}
    basic: ClassVar[tuple[str, ...]] = ("attention_interval", "guidance_interval")

    attention: bool = Field(True, description="Extrapolate attention, or the stack, between computed steps.")
    attention_interval: int = Field(
        2, ge=2, le=6, description="Compute attention, or the stack, once in this many steps; more loses motion detail."
    )
    attention_start: float = Field(
        0.14, ge=0, le=1, multiple_of=0.01, description="Share of the steps before the first extrapolated one."
    )
    reuse: Literal["attention", "stack"] = Field(
        "attention", description="Extrapolate each attention's output, or the residual of the whole stack of blocks."
    )
    extrapolation: Literal["linear", "sigma", "logsnr"] = Field(
        "linear",
        description="Extrapolation weight: rising from 0 to 1 over the steps, or by the distance in sigma or log SNR.",
    )
    guidance: bool = Field(True, description="Rebuild the unconditional branch between full steps.")
    guidance_interval: int = Field(
        5, ge=2, le=10, description="Run both branches once in this many steps; more drifts from the prompt."
    )
    guidance_start: float = Field(
        0.34, ge=0, le=1, multiple_of=0.01, description="Share of the steps before the first rebuilt one."
    )
    gain_low: float = Field(
        0.0, ge=-0.5, le=0.5, multiple_of=0.01, description="Extra guidance on coarse structure, first half only."
    )
    gain_high: float = Field(
        0.0, ge=-0.5, le=0.5, multiple_of=0.01, description="Extra guidance on fine detail, second half only."
    )
    max_cache_gib: float = Field(
        0.0,
        ge=0,
        le=512,
        description="Most GiB of attention outputs (0: any); late blocks beyond it save nothing. Not for the stack.",
    )
    cache_format: Literal["model", "fp8", "cpu"] = Field(
        "model",
        description="Cache what is reused as computed, rounded to 8 bits, or in CPU memory (copies take time).",
    )
    compound_gain: bool = Field(
        False, description="Multiply the gains again at each rebuilt step, as the authors' code does, not the paper."
    )

    def plan(self, count: int) -> list[StepPlan]:
        """What each of `count` steps computes. The first two and the last are always full."""
        plans: list[StepPlan] = []
        first_a, first_g = max(2, round(self.attention_start * count)), max(2, round(self.guidance_start * count))
        computed = 0  # the last step whose attention is computed
        for i in range(count):
            edge = i < 2 or i == count - 1
            guidance = edge or not self.guidance or i < first_g or (i - first_g + 1) % self.guidance_interval == 0
            takes_delta = self.guidance and guidance and i >= first_g - 1
            due = not self.attention or i < first_a or i - computed >= self.attention_interval
            if edge or takes_delta or due:
                computed = i
            plans.append(StepPlan(computed == i, guidance))
        return plans

    def gains(self, step: Step, since_full: int) -> tuple[float, float]:
        """Weights of the low and high band (eq. 11): (1 + gain_low, 1) in the first half, then (1, 1 + gain_high)."""
        power = since_full if self.compound_gain else 1
        early = step.index < step.count / 2
        return (1 + self.gain_low) ** power if early else 1.0, 1.0 if early else (1 + self.gain_high) ** power

    @property
    def predicts_blocks(self) -> bool:
        """With reuse by stack."""
        return self.attention and self.reuse == "stack"

    def estimate_memory(self, spec: RunSpec) -> int:
        """Bytes on the device: two outputs for each attention (or the stack) and branch, the CFG delta, one output."""
        rebuilds = any(not p.guidance for p in self._active_plan(spec.count, spec.guided))
        delta = spec.latents.numel() * (2 * 4 + spec.latents.element_size()) if rebuilds else 0
        cached = 1 if self.reuse == "stack" else self._num_cached(spec)
        return cached * self._layer_bytes(spec) + delta

    def cached_layers(self, spec: RunSpec) -> list[str]:
        """The attentions that keep their outputs: all, or the first ones, as many as fit.

        Which ones hardly matters: with half of tiny-wan-64's blocks, the last ones err 8 % more than the first.
        """
        return list(spec.family.attentions(spec.model))[: self._num_cached(spec)]

    def _num_cached(self, spec: RunSpec) -> int:
        fit = int(self.max_cache_gib * 2**30 / max(1, self._layer_bytes(spec)))
        return min(spec.num_layers, fit) if self.max_cache_gib else spec.num_layers

    def _layer_bytes(self, spec: RunSpec) -> int:
        """Bytes on the device of what one attention, or the stack, caches in all branches that reuse it."""
        device = spec.model.device if spec.latents.is_meta else spec.latents.device
        if self.cache_format == "cpu" and device.type != "cpu":
            return 0
        plans = self._active_plan(spec.count, spec.guided)
        text_tokens = spec.text_tokens if self.reuse == "attention" else 0  # the stack's residual is of the video alone
        tokens = spec.tokens + text_tokens * len(spec.latents)
        branches = [b for b in ("cond", "uncond")[: 1 + spec.guided] if reuse_steps(plans, b)]
        state, size = tokens * spec.token_bytes, spec.latents.element_size()
        return 2 * len(branches) * (state // size + len(spec.latents) * size if self.cache_format == "fp8" else state)

    def expected_work(self, spec: RunSpec, flops: dict[str, int]) -> float:
        """The plan's share: without what is extrapolated and without the rebuilt unconditional calls."""
        plans = self._active_plan(spec.count, spec.guided)
        if self.reuse == "stack":
            extrapolated = flops[DENOISER] - outside_blocks(spec.family, spec.model, flops)
        else:
            extrapolated = sum(flops[name] for name in self.cached_layers(spec))
        share = extrapolated / flops[DENOISER]
        calls = [(1 - share * (not p.attention)) * (1 + (spec.guided and p.guidance)) for p in plans]
        return sum(calls) / (len(plans) * (1 + spec.guided))

    def inactive_reason(self, spec: RunSpec) -> str:
        """Too few steps, or settings at which every step is computed."""
        if reason := too_few_steps(FasterCache, spec.count):
            return reason
        plans, caches = self._active_plan(spec.count, spec.guided), self.reuse == "stack" or self._num_cached(spec) > 0
        if all(p.guidance and (p.attention or not caches) for p in plans):
            return "FasterCache does nothing: at these settings every step is computed in full"
        return ""

    def position(self, signal: float, sigma: float) -> float:
        """Where a step stands on the scale along which the weight is measured, unless it is measured in steps."""
        return log_snr(signal, sigma) if self.extrapolation == "logsnr" else sigma

    def extrapolate(
        self, entries: list[tuple[float, Tensor]], position: float, step: Step, plans: list[StepPlan]
    ) -> Tensor:
        """The output from its last two computed ones (position, F), eq. 5: F_last + w (F_last - F_previous)."""
        (previous_position, previous), (last_position, last) = entries
        if self.extrapolation == "linear":
            steps = reuse_steps(plans, "cond")
            w = (step.index - steps[0]) / max(1, steps[-1] - steps[0])
        else:
            distance = last_position - previous_position  # 0 where a solver evaluates twice at one sigma
            w = (position - last_position) / distance if distance else 0.0
        return last.lerp(previous, -w)

    @contextmanager
    def apply(self, host: Host, trace: Trace) -> Iterator[None]:
        """Wrap the attentions, or the stack of blocks, and the denoiser inside the context."""
        state, plans = host.per_text_and_model(State), host.per_run(lambda: self._begin(host, trace))
        layers = host.per_run(lambda: self.cached_layers(run_spec(host)))

        def attend(inner: Callable[[], Tensor], layer: str) -> Tensor:
            if layer not in layers():
                return inner()
            extrapolated = self._extrapolated(layer, host, state(), plans())
            if extrapolated is not None:
                trace.record(host.step, layer, "reuse")
                return extrapolated
            out = inner()
            self._cache(out, layer, host, trace, state(), plans())
            return out

        def run_blocks(inner: Callable[..., Tensor], hidden: Tensor, *inputs, **named) -> Tensor:
            residual = self._extrapolated(STACK, host, state(), plans())
            if residual is not None:
                record_prediction(host, trace)
                return hidden + residual
            out = inner(hidden, *inputs, **named)
            self._cache(out - hidden, STACK, host, trace, state(), plans())
            return out

        def denoise(inner: Callable[..., Tensor], x: Tensor, **inputs) -> Tensor:
            return self._denoise(inner, x, inputs, host, trace, state(), plans())

        inside = host.wrap_blocks(run_blocks) if self.reuse == "stack" else host.wrap_attention(attend)
        with inside if self.attention else nullcontext(), host.wrap_denoiser(denoise):
            yield

    def _active_plan(self, count: int, guided: bool) -> list[StepPlan]:
        """The plan without the parts that cannot act in such a run."""
        if count < MIN_CACHED_STEPS:
            return [StepPlan(True, True)] * count
        return (self if guided else self.model_copy(update={"guidance": False})).plan(count)

    def _begin(self, host: Host, trace: Trace) -> list[StepPlan]:
        """The run's plan. Messages, the memory estimate and the steps that must be exact go to trace and host."""
        spec = run_spec(host)
        plans = self._active_plan(spec.count, spec.guided)
        if inactive_reason := self.inactive_reason(spec):
            trace.add_message(inactive_reason)
        elif self.guidance and not spec.guided:
            trace.add_message("FasterCache: guidance is off in this run, there is no unconditional branch to rebuild")
        report_estimate(self, spec, trace)
        host.exact_steps |= {
            i for i, (plan, following) in enumerate(pairwise(plans)) if plan.guidance and not following.guidance
        }
        return plans

    def _extrapolated(self, layer: str, host: Host, state: State, plans: list[StepPlan]) -> Tensor | None:
        """A layer's output in a step that is not to compute it; None where it must be computed.

        It must where the last two computed outputs are older than planned: another method has skipped those steps.
        """
        step = host.step
        entries = state.outputs.get((layer, step.branch), [])
        if plans[step.index].attention or len(entries) < 2:
            return None
        previous, last = entries
        if step.index - last.step >= self.attention_interval or last.step - previous.step > self.attention_interval:
            return None
        position = self.position(host.signal, step.sigma)
        return self.extrapolate([(e.position, e.output.load()) for e in entries], position, step, plans)

    def _cache(self, out: Tensor, layer: str, host: Host, trace: Trace, state: State, plans: list[StepPlan]) -> None:
        """Cache a computed output as long as a later step is extrapolated from it."""
        from ..ops.storage import store

        step, key = host.step, (layer, host.step.branch)
        steps = reuse_steps(plans, step.branch)
        if step.index == len(plans) - 1:
            state.outputs.clear()  # also of a branch that ended before: they would take memory while decoding
            trace.set_memory("fastercache", state.nbytes())
        elif not any(i > step.index for i in steps):  # no later step needs the cache
            if state.outputs.pop(key, None):
                trace.set_memory("fastercache", state.nbytes())
        elif step.index >= steps[0] - 2:  # one of the last two outputs computed before the first extrapolation
            previous = [entry for entry in state.outputs.get(key, [])[-1:] if entry.output.data.shape == out.shape]
            position, output = self.position(host.signal, step.sigma), store(out, self.cache_format)
            state.outputs[key] = [*previous, Computed(step.index, position, output)]
            trace.set_memory("fastercache", state.nbytes())

    def _denoise(self, inner, x, inputs, host: Host, trace: Trace, state: State, plans: list[StepPlan]) -> Tensor:
        if all(p.guidance for p in plans):
            return inner(x, **inputs)
        step, delta, cond = host.step, state.cfg_delta, state.cond
        fits = delta is not None and cond is not None and delta.low.shape == cond.shape
        fits = fits and step.index - delta.step < self.guidance_interval  # other methods leave out unconditional calls
        if step.branch == "uncond" and fits and not plans[step.index].guidance:
            state.since_full += 1
            low, high = self.gains(step, state.since_full)
            trace.record(step, DENOISER, "rebuild")
            return (cond + low * delta.low + high * delta.high).to(cond.dtype)
        out = inner(x, **inputs)
        if step.branch == "cond":
            state.cond = out
        if step.branch != "uncond":  # a guider may have a third one
            return out
        is_exact = plans[step.index].attention  # not where guidance has begun in an extrapolated step
        if cond is not None and is_exact and any(not p.guidance for p in plans[step.index + 1 :]):
            from ..ops.spectrum import split

            bands = split(out.float() - cond.float())
            state.cfg_delta, state.since_full = CFGDelta(step.index, *bands), 0
        else:
            state.cfg_delta = state.cond = None
        trace.set_memory("fastercache", state.nbytes())
        return out


def reuse_steps(plans: list[StepPlan], branch: str) -> list[int]:
    """The steps at which a branch runs with extrapolated attention, or with an extrapolated stack."""
    return [i for i, p in enumerate(plans) if not p.attention and (branch == "cond" or p.guidance)]
