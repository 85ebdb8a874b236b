"""AsymRnR (Sun et al., arXiv 2412.11706): fewer tokens inside self-attention, restored after it.

Queries, and keys with values, are shortened on their own: by their own likeness, at their own rate. Both happen as if
after normalisation and rotary embedding, so each kept token carries its own position; the output is brought back to
full length by giving every removed query the output of the token that stands for it. Text is never touched. While a
plan lasts, removed tokens are not even projected: the authors' code projects all of them in every step.

The authors ship schedules for three models. Here one budget is turned into rates per block and span of steps, by
what removing tokens costs there: measured beforehand (`python -m accel profile` puts it beside the model), or judged
by likeness in an early step of the run.

What the reduction misses can be carried (`carry`, see `accel/carry.py`): ours as well, and what makes high rates good.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from ...core.attention import QKV
from ...core.host import Host
from ...core.trace import DENOISER, Timer, Trace
from ...ops.tokens import Metric, Reduction
from ...students.scheduler import is_student_run
from ..base import Method, RunSpec, model_path, run_spec
from .correction import DEPTH, Correction, Cuts, ResidualCache
from .matching import Matching, PlanCache
from .schedule import RateSchedule

LEAST_SHARE = 0.15  # of the attention cores in the work, below which too little can be won
NEVER = 10**9
Rate = Annotated[float, Field(ge=0, le=0.95)]


@dataclass
class Memory:
    """What one run holds: when and how much to reduce, the plans, and what reduced attentions missed."""

    plans: PlanCache
    schedule: RateSchedule
    interval: int  # steps that share a plan
    carried: ResidualCache | None  # if anything is
    model: int = 0  # the transformer of which things are held
    timer: Timer = field(default_factory=Timer)  # on matching, cutting, shortening and restoring
    beside: Timer = field(default_factory=Timer)  # on reduced attentions beside whole ones

    def turn_to(self, model: int) -> None:
        """Forget what is held of another transformer: Wan 2.2 changes to its second one."""
        if self.model != model:
            self.plans.clear()
            if self.carried:
                self.carried.found.clear()
            self.model = model

    @property
    def held(self) -> int:
        """Bytes."""
        return self.plans.held + (self.carried.held if self.carried else 0)

    def milliseconds(self) -> dict[str, float]:
        """What the reduction cost so far, for the trace."""
        watches = {"overhead_ms": self.timer, "full_attention_ms": self.beside}
        return {name: round(1000 * timer.seconds, 2) for name, timer in watches.items()}


class AsymRnR(Method):
    """Shortens queries and keys/values of the video self-attentions, each at its own rate per block."""

    title: ClassVar[str] = "AsymRnR"
    paper: ClassVar[str] = "arXiv 2412.11706"
    neutral: ClassVar[dict] = {"budget": 1.0}

    schedule: Literal["profiled", "similarity", "fixed"] = Field(
        "profiled", description="Spread the budget by measured cost per block, or by likeness; or fixed rates."
    )
    budget: float = Field(
        0.75, ge=0.2, le=1, multiple_of=0.01, description="Share of the attention cores' work; lower blurs first."
    )
    query_rate: float = Field(
        0.85, ge=0, le=0.95, multiple_of=0.05, description="Most queries removed in a block; higher loses fine motion."
    )
    kv_rate: float = Field(
        0.85, ge=0, le=0.95, multiple_of=0.05, description="Most keys and values removed in a block; robust, but blurs."
    )
    threshold: float = Field(
        0.0, ge=0, le=1, multiple_of=0.01, description="Fixed rates act in blocks at least this alike; 0: in all."
    )
    start: float = Field(
        0.1, ge=0, le=1, multiple_of=0.01, description="Share of the steps before the first reduced one, at least one."
    )
    cell: Literal["1x2x2", "2x2x2", "3x2x2", "6x2x2"] = Field(
        "2x2x2", description="Frames x rows x columns that share one token that always stays."
    )
    matching: Matching = Field(
        "cell", description="Partners from the own cell (fast) or the whole clip (closest), or cells pooled unmatched."
    )
    metric: Metric = Field("euclidean", description="How likeness is measured.")
    heads: Literal["shared", "separate"] = Field("shared", description="One plan for all heads, or one for each.")
    pairing: Literal["asymmetric", "one"] = Field(
        "asymmetric", description="Queries and keys matched on their own, or the queries' plan for all."
    )
    merge: Literal["mean", "values", "replace"] = Field(
        "values", description="Removed tokens are averaged into the one that stays, only their values are, or dropped."
    )
    bias: bool = Field(True, description="Weigh a merged key by its size; without it, merged regions fade.")
    correction: Correction = Field(
        "linear", description="What reduction misses is added back: as last seen, or along a line (twice the memory)."
    )
    interval: int = Field(
        0,
        ge=0,
        le=10,
        description="Steps that share a matching, or a whole attention to carry from; 0: by their number.",
    )
    profile: str = Field(
        "", description="File of measured costs; empty: the model's own.", json_schema_extra={"page": False}
    )
    rates: dict[str, Annotated[list[tuple[Rate, Rate]], Field(min_length=1)]] = Field(
        {},
        description="Fixed rates (query, kv) by block, each for a share of steps.",
        json_schema_extra={"page": False},
    )

    @model_validator(mode="after")
    def _possible(self) -> AsymRnR:
        if self.rates and self.schedule != "fixed":
            raise ValueError(f"rates per block need schedule fixed, not {self.schedule}")
        most = 1 - 1 / math.prod(self._cell())
        asked = [rate for spans in self.rates.values() for pair in spans for rate in pair]
        highest = max(asked or (self.query_rate, self.kv_rate))
        if self.schedule == "fixed" and highest > most + 1e-9:
            raise ValueError(f"rate {highest} is not possible: cells of {self.cell} allow 0 to {most:.3f}")
        return self

    def _cell(self) -> tuple[int, ...]:
        return tuple(int(n) for n in self.cell.split("x"))

    def estimate_memory(self, spec: RunSpec) -> int:
        """Bytes of the plans and reductions, if every attention had one for queries and one for keys at a low rate.

        And of what they missed, if all of them are reduced.
        """
        model, family, latents, count, guided, layers, _ = spec
        n, branches = math.prod(family.grid(model, latents)), layers * (1 + guided)
        n *= len(latents)
        indices = 6 * n * (1 if self.heads == "shared" else model.config.num_attention_heads)
        plans = 4 * indices * 2 * branches  # at most: order, owner and the four of a `Reduction`
        depth = DEPTH[self.correction] if self._interval(count) > 1 else 0
        return plans + depth * branches * n * family.hidden_size(model) * latents.element_size()

    @contextmanager
    def apply(self, host: Host, trace: Trace) -> Iterator[None]:
        """Wrap the attentions' cores for the time of the context."""
        memory = host.per_run(lambda: self._begin(host, trace))

        def core(inner: Callable, qkv: QKV, layer: str) -> Tensor:
            return self._core(inner, qkv, layer, host, trace, memory())

        with host.wrap_qkv(core):
            yield

    def _interval(self, count: int, student: bool = False) -> int:
        """Steps between matchings, or whole attentions: the more steps, the less each changes."""
        if self.correction == "none":
            return self.interval or (1 if count <= 8 or student else 3 if count <= 30 else 5)
        return self.interval or (2 if count <= 8 else 3 if count <= 30 else 4)

    def _begin(self, host: Host, trace: Trace) -> Memory:
        """The run's memory; what keeps it from acting goes to the trace."""
        spec, layers = run_spec(host), list(host.attentions[host.active_index])
        count = spec.count
        plans = PlanCache(self._cell(), self.matching, self.metric, self.heads == "shared")
        interval = self._interval(count, is_student_run(host.pipe))
        carried = (
            ResidualCache(DEPTH[self.correction], interval) if self.correction != "none" and interval > 1 else None
        )
        schedule = RateSchedule(self, host, plans, self._first(count), 1 / interval if carried else 0.0)
        trace.estimated_bytes += self.estimate_memory(spec)
        share = core_flops(host) * len(layers) / trace.flops[DENOISER]
        if share < LEAST_SHARE:
            trace.add_message(f"AsymRnR is off: the attention cores are {share:.0%} of this model's work at this size")
            schedule.first = NEVER
        elif inactive_reason := self.inactive_reason(spec):
            trace.add_message(inactive_reason)
            schedule.first = NEVER
        elif self.schedule == "profiled":
            schedule.read(model_path(host))
        none = {layer: [[0.0, 0.0]] * count for layer in layers}
        told = {
            "core_share": round(share, 4),
            "rates": none,
            "kept_tokens": {},
            "overhead_ms": None,
            "full_attention_ms": None,
        }
        trace.method_data["asymrnr"] = told
        return Memory(plans, schedule, interval, carried)

    def _first(self, count: int) -> int:
        """The first step that is not protected."""
        return max(1, round(self.start * count))

    def inactive_reason(self, spec: RunSpec) -> str:
        """Where all steps are protected, or no rate is above zero."""
        pairs = [pair for spans in self.rates.values() for pair in spans] or [(self.query_rate, self.kv_rate)]
        asked = max(map(max, pairs)) and (self.schedule == "fixed" or self.budget < 1)
        if asked and self._first(spec.count) < spec.count:
            return ""
        return "AsymRnR does nothing: at these settings no token is removed"

    def _core(self, inner: Callable, qkv: QKV, layer: str, host: Host, trace: Trace, memory: Memory) -> Tensor:
        step, schedule = host.step, memory.schedule
        if schedule.first == NEVER or qkv.bias is not None:  # of another method: it says which keys these are
            return inner(qkv)
        if qkv.shape[1] != math.prod(host.grid):
            trace.add_message(f"AsymRnR is off: {qkv.shape[1]} tokens are not the grid of {host.grid}")
            return inner(qkv)
        qkv.timer = memory.timer
        if not schedule.acts(qkv, layer) or not max(rates := schedule.rates(layer)):
            return inner(qkv)
        memory.turn_to(host.active_index)
        key, n = (layer, step.branch), qkv.shape[1]
        anchor = step.index in host.exact_steps  # where the branches' difference is taken, and errors with it
        if memory.carried and not memory.carried.serves(key, step, anchor):  # another method seldom runs this one
            if step.branch == "cond":
                trace.add_message(
                    "AsymRnR leaves attentions whole that are computed too seldom to carry: raise its interval"
                )
            trace.set_memory("asymrnr", memory.held)  # less, if something was forgotten
            return inner(qkv)
        queries, matching = self._cut("query", qkv, rates[0], layer, host, memory)
        keys, more = (queries, 0) if self.pairing == "one" else self._cut("kv", qkv, rates[1], layer, host, memory)
        cuts = queries, keys
        m = [len(cut.keep[0]) if cut else n for cut in cuts]
        work, spent = m[0] * m[1] / n**2 * core_flops(host), matching + more
        if memory.carried and memory.carried.due(key, step, cuts, anchor):
            y = self._whole(inner, qkv, cuts, key, host, memory)
            trace.record(step, layer, "compute", 1 + (work - qkv.saved_flops + spent) / trace.flops[layer])
        else:
            residual = memory.carried.now(key, step) if memory.carried else None
            y = qkv.restore(inner(self._shortened(qkv, *cuts)), queries, residual)
            left = work - core_flops(host) - qkv.saved_flops + spent
            trace.record(step, layer, "reduce", 1 + left / trace.flops[layer])
            trace.method_data["asymrnr"]["rates"][layer][step.index] = [*rates]
        trace.set_memory("asymrnr", memory.held)
        if host.latents.device.type != "cuda":  # where this clock would only see the launches
            trace.method_data["asymrnr"] |= memory.milliseconds()
        return y

    def _whole(self, inner: Callable, qkv: QKV, cuts: Cuts, key: tuple, host: Host, memory: Memory) -> Tensor:
        """The attention as it is, and beside it reduced, to learn what that misses."""
        y = inner(QKV(qkv.query(), qkv.key(), qkv.value()))
        shortened = self._shortened(qkv, *cuts)
        with memory.beside:
            reduced = inner(shortened)
        residual = qkv.residual(y, reduced, cuts[0])
        memory.carried.add(key, host.step, cuts, residual)
        return y

    def _shortened(self, qkv: QKV, queries: Reduction | None, keys: Reduction | None) -> QKV:
        rows = self.merge == "mean"
        q, k = qkv.query(queries, rows), qkv.key(keys, rows)
        bias = keys.bias(qkv.shape[0], qkv.shape[2]) if keys and self.bias else None
        return QKV(q, k, qkv.value(keys, self.merge != "replace"), bias)

    def _cut(
        self, feature: str, qkv: QKV, rate: float, layer: str, host: Host, memory: Memory
    ) -> tuple[Reduction | None, int]:
        """The reduction of a feature at its rate, none at rate 0, and the FLOPs of matching."""
        if not rate:
            return None, 0
        part = memory.plans.partition(feature, host.grid, host.latents.device)
        # What is carried was missed by these cuts: while it is, one plan holds for the whole run.
        window = 0 if memory.carried else (host.step.index - memory.schedule.first) // memory.interval
        key, flops = (layer, host.step.branch, feature), 0
        if memory.plans.due(key, window, qkv.shape):
            x = qkv.query() if feature == "query" else qkv.value()
            with memory.timer:
                flops = memory.plans.match(key, window, x, part)
        with memory.timer:
            cut = memory.plans.cut(key, rate)
        if host.step.branch == "cond":
            self._show(feature, cut, layer, host)
        return cut, flops

    def _show(self, feature: str, cut: Reduction, layer: str, host: Host) -> None:
        """Which tokens of the middle frame stay when a block is cut first: rows of 0 and 1 for the page to draw."""
        shown = host.trace.method_data["asymrnr"]["kept_tokens"].setdefault(layer, {})
        if feature not in shown:
            f, h, w = host.grid
            stays = torch.zeros(f * h * w, dtype=torch.bool).index_fill(0, cut.keep[0].long().cpu(), True)
            shown[feature] = ["".join("01"[token] for token in row) for row in stays.view(f, h, w)[f // 2].tolist()]


def core_flops(host: Host) -> int:
    """Work of one whole attention core: the products of queries with keys, and of weights with values."""
    return (
        4 * len(host.latents) * math.prod(host.grid) ** 2 * host.family.hidden_size(host.denoisers[host.active_index])
    )
