"""AsymRnR (Sun et al., arXiv 2412.11706): fewer tokens inside self-attention, restored after it.

Queries, and keys with values, are shortened on their own: by their own likeness, at their own rate. Both happen after
normalisation and rotary embedding, so each kept token carries its own position; the output is brought back to full
length by giving every removed query the output of the token that stands for it. Text is never touched.

The authors ship schedules for three models. Here one budget is turned into rates per block and span of steps, by
what removing tokens costs there: measured beforehand (`python -m accel profile` puts it beside the model), or judged
by likeness in an early step of the run.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from ..budget import PROFILE, Pair, Table, allocate, load_costs, work
from ..host import Host
from ..tokens import Partition, Plan, Reduction, match, partition, pooled
from ..trace import DENOISER, Trace
from .base import Method

LEAST_SHARE = 0.15  # of the attention cores in the work, below which too little can be won
NEVER = 10**9
Rate = Annotated[float, Field(ge=0, le=0.95)]


@dataclass
class Memory:
    """What one run holds: when and how much to reduce, and the plans of the open window of steps."""

    first: int  # step from which tokens are reduced
    interval: int  # steps that share a plan
    costs: Table = field(default_factory=dict)
    rates: dict[int, Table] = field(default_factory=dict)  # by transformer
    likeness: dict[int, dict[str, Pair]] = field(default_factory=dict)  # of queries and values, by transformer and site
    partitions: dict[tuple, Partition] = field(default_factory=dict)
    plans: dict[tuple, tuple[int, Plan]] = field(default_factory=dict)  # with the window they are of
    cuts: dict[tuple, tuple[Plan, float, Reduction]] = field(default_factory=dict)
    seconds: float = 0.0  # spent on matching, cutting, shortening and restoring

    def held(self) -> int:
        """Bytes of all plans and reductions."""
        plans = [t for _, plan in self.plans.values() for t in (plan.order, plan.owner)]
        cuts = [t for *_, cut in self.cuts.values() for t in (cut.keep, cut.place, cut.sizes)]
        return sum(t.nbytes for t in plans + cuts)


class AsymRnR(Method):
    """Shortens queries and keys/values of the video self-attentions, each at its own rate per block."""

    title: ClassVar[str] = "AsymRnR"
    paper: ClassVar[str] = "arXiv 2412.11706"
    neutral: ClassVar[dict] = {"budget": 1.0}

    schedule: Literal["measured", "judged", "fixed"] = Field(
        "measured", description="Spread the budget by measured cost per block, or by likeness; or fixed rates."
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
    profile: str = Field(
        "", description="JSON file of measured costs; empty: the model's own.", json_schema_extra={"page": False}
    )
    rates: dict[str, list[tuple[Rate, Rate]]] = Field(
        {}, description="Fixed rates (query, kv) per span of steps, by block.", json_schema_extra={"page": False}
    )

    def forecast(self, model: nn.Module, family: ModuleType, latents: Tensor, count: int, guided: bool) -> int:
        """Bytes of the plans and reductions, if every attention had one for queries and one for keys at a low rate."""
        n = math.prod(family.grid(model, latents))
        groups = len(latents) * (1 if self.heads == "shared" else model.config.num_attention_heads)
        indices = 5 * n * groups  # at most: order, owner, keep, place, sizes
        return 8 * indices * 2 * len(family.attentions(model)) * (1 + guided)

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
        count, sites = host.step.count, list(host.attentions[host.model])
        memory = Memory(
            max(1, round(self.start * count)), self.interval or (1 if count <= 8 else 3 if count <= 30 else 5)
        )
        given = (host.models[host.model], host.family, host.latents, count, host.family.is_guided(host.pipe))
        trace.bytes_forecast += self.forecast(*given)
        share = core_flops(host) * len(sites) / trace.flops[DENOISER]
        if share < LEAST_SHARE:
            trace.note(f"AsymRnR is off: the attention cores are {share:.0%} of this model's work at this size")
            memory.first = NEVER
        elif memory.first >= count or self._asks_nothing():
            trace.note("AsymRnR does nothing: at these settings no token is removed")
            memory.first = NEVER
        elif self.schedule == "measured":
            memory.costs = self._costs(host, trace)
        none = {site: [[0.0, 0.0]] * count for site in sites}
        trace.extras["asymrnr"] = {"core_share": round(share, 4), "rates": none, "kept": {}, "overhead_ms": 0.0}
        return memory

    def _asks_nothing(self) -> bool:
        if self.rates:
            return not any(max(pair) for spans in self.rates.values() for pair in spans)
        return not max(self.query_rate, self.kv_rate) if self.schedule == "fixed" else self.budget == 1

    def _costs(self, host: Host, trace: Trace) -> Table:
        """The costs of the profile that was given, or of the model's own; none if it has none."""
        own = Path(host.pipe.name_or_path or "nowhere") / PROFILE
        if not self.profile and not own.is_file():
            trace.note("AsymRnR judges the blocks by likeness: this model has no profile (python -m accel profile)")
            return {}
        return load_costs(self.profile or own, list(host.attentions[host.model]))

    def _core(self, inner, q, k, v, site: str, host: Host, trace: Trace, memory: Memory) -> Tensor:
        step = host.step
        if self._judges(q, v, site, host, memory) or step.index < memory.first:
            return inner(q, k, v)
        if q.shape[1] != math.prod(host.grid):
            trace.note(f"AsymRnR is off: {q.shape[1]} tokens are not the grid of {host.grid}")
            return inner(q, k, v)
        query_rate, kv_rate = self._rates(site, host, trace, memory)
        if not query_rate and not kv_rate:
            return inner(q, k, v)
        trace.extras["asymrnr"]["rates"][site][step.index] = [query_rate, kv_rate]
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
        trace.record(step, site, "reduce", 1 - (1 - left) * core_flops(host) / trace.flops[site])
        trace.extras["asymrnr"]["overhead_ms"] = round(1000 * memory.seconds, 2)
        return out

    def _judges(self, q: Tensor, v: Tensor, site: str, host: Host, memory: Memory) -> bool:
        """Looks at likeness where it is asked for and not known yet; true while a block's is missing.

        That is in the last protected step, or later for a block that another method skipped there.
        """
        wanted = self.threshold > 0 if self.schedule == "fixed" else not memory.costs
        seen, sites = memory.likeness.setdefault(host.model, {}), host.attentions[host.model]
        if not wanted or len(seen) == len(sites) or host.step.index < memory.first - 1:
            return False
        if site not in seen and host.step.branch == "cond":
            seen[site] = self._likeness(q, v, host, memory)
            if len(seen) == len(sites):  # both branches are reduced from the same step on
                memory.first = max(memory.first, host.step.index + 1)
        return True

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
        if host.model not in memory.rates:
            rates = memory.rates[host.model] = self._settle(host, memory)
            left = (work(rates) * (host.step.count - memory.first) + memory.first) / host.step.count
            if self.schedule != "fixed" and left > self.budget + 0.02:
                trace.note(f"AsymRnR: the budget of {self.budget} is out of reach, {left:.2f} of the work is left")
            told = trace.extras["asymrnr"]
            told["forecast"] = round(1 / (1 - told["core_share"] * (1 - left)), 3)
        spans = memory.rates[host.model][site]
        done = (host.step.index - memory.first) / max(1, host.step.count - memory.first)
        return spans[int(done * len(spans))]

    def _settle(self, host: Host, memory: Memory) -> Table:
        sites, count, seen = host.attentions[host.model], host.step.count, memory.likeness[host.model]
        most = self._partition("query", host, memory).max_rate  # the keys' cells are as large
        if self.schedule == "fixed":
            rates = self.rates or {site: [(self.query_rate, self.kv_rate)] for site in sites}
            self._check(rates, sites, most)
            keep = lambda spans, alike: [tuple(r * (a >= self.threshold) for r, a in zip(s, alike)) for s in spans]
            return {site: keep(rates.get(site, [(0.0, 0.0)]), seen.get(site, (1.0, 1.0))) for site in sites}
        costs = memory.costs or {site: [tuple(1 - a for a in seen[site])] for site in sites}
        target = max(0.0, self.budget * count - memory.first) / (count - memory.first)
        return allocate(costs, target, (min(self.query_rate, most), min(self.kv_rate, most)))

    def _check(self, rates: Table, sites: Iterable[str], most: float) -> None:
        if strange := sorted(set(rates) - set(sites)):
            raise ValueError(f"there is no attention {strange[0]!r} to give a rate; there are {', '.join(sites)}")
        if (highest := max(rate for spans in rates.values() for pair in spans for rate in pair)) > most:
            raise ValueError(f"rate {highest} is not possible: cells of {self.cell} allow 0 to {most:.3f}")

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
            if step.branch == "cond":
                self._show(feature, cut, site, host)
        return cut

    def _show(self, feature: str, cut: Reduction, site: str, host: Host) -> None:
        """Which tokens of the middle frame stay when a block is cut first: rows of 0 and 1 for the page to draw."""
        shown = host.trace.extras["asymrnr"]["kept"].setdefault(site, {})
        if feature not in shown:
            f, h, w = host.grid
            stays = torch.zeros(f * h * w, dtype=torch.bool).index_fill(0, cut.keep[0].cpu(), True)
            shown[feature] = ["".join("01"[token] for token in row) for row in stays.view(f, h, w)[f // 2].tolist()]

    def _match(self, x: Tensor, part: Partition) -> Plan:
        shared = self.heads == "shared"
        if self.matching == "grid":
            return pooled(part, len(x) if shared else len(x) * x.shape[2])
        return match(x, part, self.metric, self.matching == "global", shared)


def core_flops(host: Host) -> int:
    """Work of one whole attention core: the products of queries with keys, and of weights with values."""
    return 4 * len(host.latents) * math.prod(host.grid) ** 2 * host.family.width(host.models[host.model])
