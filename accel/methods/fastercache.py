"""FasterCache (Lv et al., arXiv 2410.19355): reuse attention outputs, rebuild the unconditional branch.

Dynamic feature reuse: on some steps the output of a self-attention is extrapolated from its last two computed
outputs (eq. 5). CFG-Cache: on some steps only the conditional branch runs; the unconditional output is the
conditional one plus the low and high bands of their last difference, each with its own gain (eq. 6-11).

The two are aligned: a step that runs both branches also computes their attention. Left unaligned, the difference
is taken between extrapolated features and errors of both parts multiply.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from ..core.host import Host
from ..core.trace import DENOISER, Step, Trace
from ..ops.spectrum import split
from .base import Method, RunSpec, run_spec

FEWEST_STEPS = 10  # below, neighbouring steps differ too much to stand for each other


@dataclass(frozen=True)
class Plan:
    """What one step computes."""

    attention: bool  # else extrapolated
    guidance: bool  # both branches run; else the unconditional one is rebuilt


@dataclass
class Memory:
    """What one run holds: attention outputs by (model, site, branch), the branches' difference, the last cond."""

    outputs: dict[tuple[int, str, str], list[tuple[float, Tensor]]] = field(default_factory=dict)
    bands: tuple[int, Tensor, Tensor] | None = None  # model, low, high
    cond: Tensor | None = None
    model: int = 0  # which transformer the outputs are of
    since_full: int = 0  # steps rebuilt since the last full one

    def held(self) -> int:
        """Bytes of everything held."""
        tensors = [t for entries in self.outputs.values() for _, t in entries]
        tensors += [*self.bands[1:]] if self.bands else []
        tensors += [self.cond] if self.cond is not None else []
        return sum(t.nbytes for t in tensors)


class FasterCache(Method):
    """Extrapolates self-attention outputs and rebuilds the unconditional branch on scheduled steps."""

    title: ClassVar[str] = "FasterCache"
    paper: ClassVar[str] = "arXiv 2410.19355"
    neutral: ClassVar[dict] = {"attention": False, "guidance": False}

    attention: bool = Field(True, description="Extrapolate attention outputs between computed steps.")
    attention_interval: int = Field(
        2, ge=2, le=6, description="Attention is computed once in this many steps; higher loses motion detail."
    )
    attention_start: float = Field(
        0.14, ge=0, le=1, multiple_of=0.01, description="Share of the steps before the first extrapolated one."
    )
    extrapolation: Literal["linear", "sigma"] = Field(
        "linear", description="Strength of the extrapolation: rising from 0 to 1, or by the distance in noise level."
    )
    guidance: bool = Field(True, description="Rebuild the unconditional branch between full steps.")
    guidance_interval: int = Field(
        5, ge=2, le=10, description="Both branches run once in this many steps; higher drifts from the prompt."
    )
    guidance_start: float = Field(
        0.34, ge=0, le=1, multiple_of=0.01, description="Share of the steps before the first rebuilt one."
    )
    gain_low: float = Field(
        0.0, ge=-0.5, le=0.5, multiple_of=0.01, description="Extra guidance on coarse structure, earlier half only."
    )
    gain_high: float = Field(
        0.0, ge=-0.5, le=0.5, multiple_of=0.01, description="Extra guidance on fine detail, later half only."
    )
    compound_gain: bool = Field(
        False, description="Let the gains grow with each rebuilt step, as the authors' code does and the paper not."
    )

    def plan(self, count: int) -> list[Plan]:
        """What each of `count` steps computes. The first two and the last are always full."""
        plans: list[Plan] = []
        first_a, first_g = max(2, round(self.attention_start * count)), max(2, round(self.guidance_start * count))
        computed = 0  # the last step whose attention is computed
        for i in range(count):
            edge = i < 2 or i == count - 1
            guidance = edge or not self.guidance or i < first_g or (i - first_g + 1) % self.guidance_interval == 0
            aligned = self.guidance and guidance and i >= first_g - 1
            due = not self.attention or i < first_a or i - computed >= self.attention_interval
            if edge or aligned or due:
                computed = i
            plans.append(Plan(computed == i, guidance))
        return plans

    def gains(self, step: Step, since_full: int) -> tuple[float, float]:
        """Weights of the low and high band (eq. 11): (1 + gain_low, 1) in the first half, then (1, 1 + gain_high)."""
        power = since_full if self.compound_gain else 1
        early = step.index < step.count / 2
        return (1 + self.gain_low) ** power if early else 1.0, 1.0 if early else (1 + self.gain_high) ** power

    def estimate_memory(self, spec: RunSpec) -> int:
        """Two outputs per attention and branch, and of the latents' size two float32 bands and one cond output."""
        model, family, latents, count, guided, layers, _ = spec
        plans = self._switched(count, guided)
        tokens = math.prod(family.grid(model, latents)) * len(latents)
        outputs = 2 * layers * tokens * family.hidden_size(model) * latents.element_size()
        branches = [b for b in ("cond", "uncond")[: 1 + guided] if reused(plans, b)]
        cached = any(not p.guidance for p in plans)
        velocity = latents.numel() // latents.shape[1] * model.config.out_channels
        return outputs * len(branches) + (velocity * (2 * 4 + latents.element_size()) if cached else 0)

    @contextmanager
    def apply(self, host: Host, trace: Trace) -> Iterator[None]:
        """Wrap the attentions and the denoiser for the time of the context."""
        memory, plans = host.per_run(Memory), host.per_run(lambda: self._plans(host, trace))

        def attend(inner: Callable[[], Tensor], layer: str) -> Tensor:
            return self._attend(inner, layer, host, trace, memory(), plans())

        def denoise(inner: Callable[..., Tensor], x: Tensor, **inputs) -> Tensor:
            return self._denoise(inner, x, inputs, host, trace, memory(), plans())

        with host.wrap_attention(attend), host.wrap_denoiser(denoise):
            yield

    def _switched(self, count: int, guided: bool) -> list[Plan]:
        """The plan with the parts off that cannot act in such a run."""
        if count < FEWEST_STEPS:
            return [Plan(True, True)] * count
        return (self if guided else self.model_copy(update={"guidance": False})).plan(count)

    def inactive_reason(self, spec: RunSpec) -> str:
        """Where there are too few steps to find two alike, or all are to be computed."""
        if spec.count < FEWEST_STEPS:
            return f"FasterCache is off: {spec.count} steps are too few, it needs at least {FEWEST_STEPS}"
        if all(p == Plan(True, True) for p in self._switched(spec.count, spec.guided)):
            return "FasterCache does nothing: at these settings every step is computed in full"
        return ""

    def _plans(self, host: Host, trace: Trace) -> list[Plan]:
        """The run's plan; what keeps it from acting, and what it will hold, goes to the trace."""
        spec = run_spec(host)
        plans = self._switched(spec.count, spec.guided)
        if inactive_reason := self.inactive_reason(spec):
            trace.add_message(inactive_reason)
        elif self.guidance and not spec.guided:
            trace.add_message("FasterCache: guidance is off in this run, there is no unconditional branch to rebuild")
        trace.estimated_bytes += self.estimate_memory(spec)
        host.exact_steps |= {i for i, (now, then) in enumerate(pairwise(plans)) if now.guidance and not then.guidance}
        return plans

    def _attend(self, inner, layer: str, host: Host, trace: Trace, memory: Memory, plans: list[Plan]) -> Tensor:
        step, key = host.step, (host.active_index, layer, host.step.branch)
        if memory.model != host.active_index:  # Wan 2.2 has changed to its second transformer
            memory.outputs.clear()
            memory.model = host.active_index
        entries = memory.outputs.get(key, [])
        if not plans[step.index].attention and len(entries) == 2:
            trace.record(step, layer, "reuse")
            return self._extrapolate(entries, step, plans)
        out = inner()
        steps = reused(plans, step.branch)
        if not any(i > step.index for i in steps):  # nobody will ask again
            if memory.outputs.pop(key, None):
                trace.set_memory("fastercache", memory.held())
        elif step.index >= steps[0] - 2:  # among the last two computed when the first extrapolation comes
            fits = [e for e in entries[-1:] if e[1].shape == out.shape]
            memory.outputs[key] = [*fits, (step.sigma, out)]
            trace.set_memory("fastercache", memory.held())
        return out

    def _extrapolate(self, entries: list[tuple[float, Tensor]], step: Step, plans: list[Plan]) -> Tensor:
        """F_last + w (F_last - F_prev), eq. 5."""
        (before, previous), (last, latest) = entries
        if self.extrapolation == "sigma":
            w = (step.sigma - last) / (last - before)
        else:
            steps = reused(plans, "cond")
            w = (step.index - steps[0]) / max(1, steps[-1] - steps[0])
        return latest.lerp(previous, -w)

    def _denoise(self, inner, x, inputs, host: Host, trace: Trace, memory: Memory, plans: list[Plan]) -> Tensor:
        if all(p.guidance for p in plans):
            return inner(x, **inputs)
        step, bands, cond = host.step, memory.bands, memory.cond
        fits = bands is not None and cond is not None and bands[0] == host.active_index and bands[1].shape == cond.shape
        if step.branch == "uncond" and fits and not plans[step.index].guidance:
            memory.since_full += 1
            low, high = self.gains(step, memory.since_full)
            trace.record(step, DENOISER, "rebuild")
            return (cond + low * bands[1] + high * bands[2]).to(cond.dtype)
        out = inner(x, **inputs)
        if step.branch == "cond":
            memory.cond = out
        elif cond is not None and any(not p.guidance for p in plans[step.index + 1 :]):
            memory.bands, memory.since_full = (host.active_index, *split(out.float() - cond.float())), 0
            trace.set_memory("fastercache", memory.held())
        else:
            memory.bands = memory.cond = None
            trace.set_memory("fastercache", memory.held())
        return out


def reused(plans: list[Plan], branch: str) -> list[int]:
    """The steps at which a branch runs with extrapolated attention."""
    return [i for i, p in enumerate(plans) if not p.attention and (branch == "cond" or p.guidance)]
