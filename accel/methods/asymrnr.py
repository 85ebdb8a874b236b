"""AsymRnR (Sun et al., arXiv 2412.11706): fewer tokens inside self-attention, restored after it.

Queries, and keys with values, are shortened on their own: by their own likeness, at their own rate. Both happen after
normalisation and rotary embedding, so each kept token carries its own position; the output is brought back to full
length by giving every removed query the output of the token that stands for it. Text is never touched.

The authors ship schedules for three models. Here one budget is turned into rates per block and span of steps, by
what removing tokens costs there: measured beforehand (a profile), or judged by likeness in an early step of the run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from ..budget import Pair, Table, allocate, load_costs, work
from ..host import Host
from ..tokens import Partition, Plan, Reduction, match, partition, pooled
from ..trace import DENOISER, Trace
from .base import Method

LEAST_SHARE = 0.15  # of the attention cores in the work, below which too little can be won
NEVER = 10**9


@dataclass
class Memory:
    """What one run holds: when and how much to reduce, and the plans of the open window of steps."""

    first: int  # step from which tokens are reduced
    interval: int  # steps that share a plan
    costs: Table = field(default_factory=dict)
    rates: Table = field(default_factory=dict)
    likeness: dict[str, Pair] = field(default_factory=dict)  # of queries, of values, by site
    partitions: dict[tuple, Partition] = field(default_factory=dict)
    plans: dict[tuple, tuple[int, Plan]] = field(default_factory=dict)  # with the window they are of
    cuts: dict[tuple, tuple[Plan, float, Reduction]] = field(default_factory=dict)
    seconds: float = 0.0  # spent on matching, cutting, shortening and restoring

    def held(self) -> int:
        """Bytes of all plans and reductions."""
        plans = [t for _, plan in self.plans.values() for t in (plan.order, plan.owner)]
        cuts = [t for *_, cut in self.cuts.values() for t in (cut.keep, cut.place)]
        return sum(t.nbytes for t in plans + cuts)


class AsymRnR(Method):
    """Shortens queries and keys/values of the video self-attentions, each at its own rate per block."""

    title: ClassVar[str] = "AsymRnR"
    paper: ClassVar[str] = "arXiv 2412.11706"
    neutral: ClassVar[dict] = {"schedule": "budget", "budget": 1.0}

    schedule: Literal["budget", "fixed"] = Field(
        "budget", description="Spread a budget over blocks by what removing costs, or the same two rates everywhere."
    )
    budget: float = Field(
        0.6, ge=0.2, le=1, multiple_of=0.01, description="Share of the attention cores' work; lower blurs detail first."
    )
    query_rate: float = Field(
        0.6, ge=0, le=0.95, multiple_of=0.05, description="Most queries removed in a block; higher loses fine motion."
    )
    kv_rate: float = Field(
        0.6, ge=0, le=0.95, multiple_of=0.05, description="Most keys and values removed in a block; robust, but blurs."
    )
    threshold: float = Field(
        0.0, ge=0, le=1, multiple_of=0.01, description="Fixed rates act in blocks at least this alike; 0: in all."
    )
    start: float = Field(
        0.1, ge=0, le=1, multiple_of=0.01, description="Share of the steps before the first reduced one."
    )
    cell: Literal["1x2x2", "2x2x2", "3x2x2", "6x2x2"] = Field(
        "2x2x2", description="Frames x rows x columns that share one token that always stays."
    )
    matching: Literal["cell", "global", "grid"] = Field(
        "cell", description="Partners from the own cell (fast) or the whole clip (closest), or cells pooled unmatched."
    )
    metric: Literal["euclidean", "cosine", "dot"] = Field("euclidean", description="How likeness is measured.")
    heads: Literal["shared", "separate"] = Field("shared", description="One plan for all heads, or one for each.")
    plans: Literal["asymmetric", "one"] = Field(
        "asymmetric", description="Queries and keys matched on their own, or the queries' plan for all."
    )
    merge: Literal["mean", "replace"] = Field(
        "mean", description="Removed tokens are averaged into the one that stays, or dropped."
    )
    bias: bool = Field(True, description="Weigh a merged key by its size; without it, merged regions fade.")
    interval: int = Field(0, ge=0, le=10, description="Steps that share a matching; 0: by the number of steps.")
    profile: str = Field("", description="JSON file of measured costs per block; empty: judged in the run.")

    @contextmanager
    def apply(self, host: Host, trace: Trace) -> Iterator[None]:
        """Wrap the attentions' cores for the time of the context."""
        memory = host.per_run(lambda: self._begin(host, trace))

        def core(inner: Callable, q: Tensor, k: Tensor, v: Tensor, site: str, bias: None = None) -> Tensor:
            return self._core(inner, q, k, v, site, host, trace, memory())

        with host.wrap_heads(core):
            yield

    def _begin(self, host: Host, trace: Trace) -> Memory:
        """The run's memory; what keeps it from acting goes to the trace."""
        count = host.step.count
        memory = Memory(
            max(1, round(self.start * count)), self.interval or (1 if count <= 8 else 3 if count <= 30 else 5)
        )
        share = core_share(host, trace)
        if share < LEAST_SHARE:
            trace.note(f"AsymRnR is off: the attention cores are {share:.0%} of this model's work at this size")
            memory.first = NEVER
        elif memory.first >= count or (self.budget == 1 if self.schedule == "budget" else not self._most()):
            trace.note("AsymRnR does nothing: at these settings no token is removed")
            memory.first = NEVER
        elif self.profile:
            memory.costs = load_costs(self.profile, list(host.attentions[host.model]))
        trace.extras["asymrnr"] = {"core_share": round(share, 4), "rates": {}, "first": memory.first}
        return memory

    def _most(self) -> float:
        return max(self.query_rate, self.kv_rate)

    def _core(self, inner, q, k, v, site: str, host: Host, trace: Trace, memory: Memory) -> Tensor:
        step = host.step
        if step.index < memory.first:
            if step.index == memory.first - 1 and step.branch == "cond" and self._asks_likeness(memory):
                memory.likeness[site] = self._likeness(q, v, host, memory)
            return inner(q, k, v)
        if q.shape[1] != _tokens(host):
            trace.note(f"AsymRnR is off: {q.shape[1]} tokens are not the grid of {host.grid}")
            return inner(q, k, v)
        query_rate, kv_rate = self._rates(site, host, trace, memory)
        if not query_rate and not kv_rate:
            return inner(q, k, v)
        began = time.perf_counter()
        queries = self._cut("query", q, query_rate, site, host, memory)
        keys = queries if self.plans == "one" else self._cut("kv", v, kv_rate, site, host, memory)
        mean, n = self.merge == "mean", q.shape[1]
        q = queries.reduce(q, mean) if queries else q
        k, v = (keys.reduce(x, mean) if keys else x for x in (k, v))
        bias = keys.bias(len(v), v.shape[2]) if keys and self.bias else None
        memory.seconds += time.perf_counter() - began
        out = inner(q, k, v, bias=bias)
        began = time.perf_counter()
        out = queries.restore(out) if queries else out
        memory.seconds += time.perf_counter() - began
        left = (q.shape[1] / n) * (k.shape[1] / n)
        whole = 4 * len(q) * n * n * q.shape[2] * q.shape[3]
        trace.record(step, site, "reduce", 1 - (1 - left) * whole / trace.flops[site])
        trace.extras["asymrnr"]["overhead_ms"] = round(1000 * memory.seconds, 2)
        return out

    def _asks_likeness(self, memory: Memory) -> bool:
        return not memory.costs if self.schedule == "budget" else self.threshold > 0

    def _likeness(self, q: Tensor, v: Tensor, host: Host, memory: Memory) -> Pair:
        """How alike queries, and values, are to the tokens they would merge into (0: as random ones, 1: the same)."""
        return tuple(
            match(x, self._partition(feature, host, memory), self.metric, self.matching == "global")
            .likeness.mean()
            .item()
            for feature, x in (("query", q), ("kv", v))
        )

    def _rates(self, site: str, host: Host, trace: Trace, memory: Memory) -> Pair:
        """Query and key/value rate of a site at this step; all sites' are settled at the first call."""
        if not memory.rates:
            memory.rates = self._settle(host, trace, memory)
            trace.extras["asymrnr"]["rates"] = memory.rates
        spans = memory.rates[site]
        done = (host.step.index - memory.first) / max(1, host.step.count - memory.first)
        return spans[int(done * len(spans))]

    def _settle(self, host: Host, trace: Trace, memory: Memory) -> Table:
        sites, count = host.attentions[host.model], host.step.count
        most = min(self._partition(f, host, memory).max_rate for f in ("query", "kv"))
        if self.schedule == "fixed":
            if self._most() > most:
                raise ValueError(f"rate {self._most()} is not possible: cells of {self.cell} allow 0 to {most:.3f}")
            alike = {site: memory.likeness.get(site, (1.0, 1.0)) for site in sites}
            pick = lambda seen: tuple(r * (a >= self.threshold) for r, a in zip((self.query_rate, self.kv_rate), seen))
            return {site: [pick(alike[site])] for site in sites}
        costs = memory.costs or {site: [tuple(1 - a for a in memory.likeness[site])] for site in sites}
        target = max(0.0, self.budget * count - memory.first) / (count - memory.first)
        rates = allocate(costs, target, (min(self.query_rate, most), min(self.kv_rate, most)))
        if (left := work(rates)) > target + 0.02:
            whole = (left * (count - memory.first) + memory.first) / count
            trace.note(f"AsymRnR: the budget of {self.budget} is out of reach, {whole:.2f} of the work is left")
        return rates

    def _partition(self, feature: str, host: Host, memory: Memory) -> Partition:
        key = (feature, host.grid)
        if key not in memory.partitions:
            cell = tuple(int(n) for n in self.cell.split("x"))
            device = host.latents.device
            memory.partitions[key] = partition(host.grid, cell, 0 if feature == "query" else 1, device)
        return memory.partitions[key]

    def _cut(self, feature: str, x: Tensor, rate: float, site: str, host: Host, memory: Memory) -> Reduction | None:
        """The reduction of a feature at its rate; matched anew when a window of steps begins."""
        if not rate:
            return None
        key, step = (host.model, site, host.step.branch, feature), host.step
        window = (step.index - memory.first) // memory.interval
        known, plan = memory.plans.get(key, (-1, None))
        if known != window or plan.order.shape[0] not in (len(x), len(x) * x.shape[2]):
            plan = self._match(x, self._partition(feature, host, memory))
            memory.plans[key] = (window, plan)
        cut_of, cut_at, cut = memory.cuts.get(key, (None, 0.0, None))
        if cut_of is not plan or cut_at != rate:
            cut = plan.cut(rate)
            memory.cuts[key] = (plan, rate, cut)
            host.trace.hold(memory.held())
        return cut

    def _match(self, x: Tensor, part: Partition) -> Plan:
        shared = self.heads == "shared"
        if self.matching == "grid":
            return pooled(part, len(x) if shared else len(x) * x.shape[2])
        return match(x, part, self.metric, self.matching == "global", shared)


def core_share(host: Host, trace: Trace) -> float:
    """The share of a call's work that lies in the products of queries with keys and of weights with values."""
    n, model = _tokens(host), host.models[host.model]
    cores = 4 * len(host.latents) * n * n * host.family.width(model) * len(host.attentions[host.model])
    return cores / trace.flops[DENOISER]


def _tokens(host: Host) -> int:
    f, h, w = host.grid
    return f * h * w
