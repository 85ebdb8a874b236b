"""AsymRnR (Sun et al., arXiv 2412.11706): fewer tokens inside self-attention, restored after it.

Queries, and keys with values, are shortened on their own: by their own likeness, at their own rate. Both happen as if
after normalisation and rotary embedding, so each kept token carries its own position; the output is brought back to
full length by giving every removed query the output of the token that stands for it. Text is never touched. While a
plan lasts, removed tokens are not even projected: the authors' code projects all of them in every step.

The authors ship schedules for three models. Here one budget is turned into rates per block and span of steps, by
what removing tokens costs there: measured beforehand (`python -m accel profile` puts it beside the model), or judged
by likeness in an early step of the run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from ..budget import PROFILE, Pair, Table, allocate, load_profile, span_of, work
from ..heads import Heads
from ..host import Host
from ..plans import Matching, PlanCache
from ..student import by_student
from ..tokens import Metric, Reduction
from ..trace import DENOISER, Stopwatch, Trace
from .base import Ahead, Method, ahead_of, place_of

LEAST_SHARE = 0.15  # of the attention cores in the work, below which too little can be won
NEVER = 10**9
Rate = Annotated[float, Field(ge=0, le=0.95)]


@dataclass
class Memory:
    """What one run holds: when and how much to reduce, and the plans of the open window of steps."""

    first: int  # step from which tokens may be removed
    interval: int  # steps that share a plan
    plans: PlanCache
    model: int = 0  # the transformer whose plans are held
    costs: Table = field(default_factory=dict)
    rates: dict[int, Table] = field(default_factory=dict)  # by transformer
    likeness: dict[int, dict[str, Pair]] = field(default_factory=dict)  # of queries and values, by transformer and site
    judged: dict[int, int] = field(default_factory=dict)  # step in which the last of these was found, by transformer
    watch: Stopwatch = field(default_factory=Stopwatch)  # on matching, cutting, shortening and restoring


class AsymRnR(Method):
    """Shortens queries and keys/values of the video self-attentions, each at its own rate per block."""

    title: ClassVar[str] = "AsymRnR"
    paper: ClassVar[str] = "arXiv 2412.11706"
    neutral: ClassVar[dict] = {"budget": 1.0}

    schedule: Literal["measured", "judged", "fixed"] = Field(
        "measured", description="Spread the budget by measured cost per block, or by likeness; or fixed rates."
    )
    budget: float = Field(
        0.75, ge=0.2, le=1, multiple_of=0.01, description="Share of the attention cores' work; lower blurs first."
    )
    query_rate: float = Field(
        0.8, ge=0, le=0.95, multiple_of=0.05, description="Most queries removed in a block; higher loses fine motion."
    )
    kv_rate: float = Field(
        0.8, ge=0, le=0.95, multiple_of=0.05, description="Most keys and values removed in a block; robust, but blurs."
    )
    threshold: float = Field(
        0.0, ge=0, le=1, multiple_of=0.01, description="Fixed rates act in blocks at least this alike; 0: in all."
    )
    start: float = Field(
        0.3, ge=0, le=1, multiple_of=0.01, description="Share of the steps before the first reduced one, at least one."
    )
    cell: Literal["1x2x2", "2x2x2", "3x2x2", "6x2x2"] = Field(
        "2x2x2", description="Frames x rows x columns that share one token that always stays."
    )
    matching: Matching = Field(
        "cell", description="Partners from the own cell (fast) or the whole clip (closest), or cells pooled unmatched."
    )
    metric: Metric = Field("euclidean", description="How likeness is measured.")
    heads: Literal["shared", "separate"] = Field("shared", description="One plan for all heads, or one for each.")
    plans: Literal["asymmetric", "one"] = Field(
        "asymmetric", description="Queries and keys matched on their own, or the queries' plan for all."
    )
    merge: Literal["mean", "values", "replace"] = Field(
        "values", description="Removed tokens are averaged into the one that stays, only their values are, or dropped."
    )
    bias: bool = Field(True, description="Weigh a merged key by its size; without it, merged regions fade.")
    interval: int = Field(0, ge=0, le=10, description="Steps that share a matching; 0: by the number of steps.")
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

    def forecast(self, ahead: Ahead) -> int:
        """Bytes of the plans and reductions, if every attention had one for queries and one for keys at a low rate."""
        model, family, latents, _, guided, _ = ahead
        n = math.prod(family.grid(model, latents))
        groups = len(latents) * (1 if self.heads == "shared" else model.config.num_attention_heads)
        indices = 6 * n * groups  # at most: order, owner, keep, place, sizes, members
        return 4 * indices * 2 * len(family.attentions(model)) * (1 + guided)

    @contextmanager
    def apply(self, host: Host, trace: Trace) -> Iterator[None]:
        """Wrap the attentions' cores for the time of the context."""
        memory = host.per_run(lambda: self._begin(host, trace))

        def core(inner: Callable, heads: Heads, site: str) -> Tensor:
            return self._core(inner, heads, site, host, trace, memory())

        with host.wrap_heads(core):
            yield

    def _begin(self, host: Host, trace: Trace) -> Memory:
        """The run's memory; what keeps it from acting goes to the trace."""
        count, sites = host.step.count, list(host.attentions[host.model])
        plans = PlanCache(self._cell(), self.matching, self.metric, self.heads == "shared")
        interval = self.interval or (1 if count <= 8 or by_student(host.pipe) else 3 if count <= 30 else 5)
        memory = Memory(max(1, round(self.start * count)), interval, plans)
        trace.bytes_forecast += self.forecast(ahead_of(host))
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
        trace.extras["asymrnr"] = {"core_share": round(share, 4), "rates": none, "kept": {}, "overhead_ms": None}
        return memory

    def _asks_nothing(self) -> bool:
        if self.rates:
            return not any(max(pair) for spans in self.rates.values() for pair in spans)
        return not max(self.query_rate, self.kv_rate) or (self.schedule != "fixed" and self.budget == 1)

    def _costs(self, host: Host, trace: Trace) -> Table:
        """The costs of the profile that was given, or of the model's own; none if it has none."""
        own = Path(place_of(host)) / PROFILE
        if not self.profile and not own.is_file():
            trace.note("AsymRnR judges the blocks by likeness: no profile of this model (python -m accel profile)")
            return {}
        profile = load_profile(self.profile or own, list(host.attentions[host.model]))
        if by_student(host.pipe):
            trace.note("AsymRnR: the costs were measured without the student that runs")
        if profile.grid != host.grid:
            trace.note(f"AsymRnR: the costs were measured on a grid of {profile.grid} tokens, this one is {host.grid}")
        return profile.costs

    def _core(self, inner: Callable, heads: Heads, site: str, host: Host, trace: Trace, memory: Memory) -> Tensor:
        step = host.step
        if memory.first == NEVER or heads.bias is not None:  # of another method: it says which keys these are
            return inner(heads)
        if heads.shape[1] != math.prod(host.grid):
            trace.note(f"AsymRnR is off: {heads.shape[1]} tokens are not the grid of {host.grid}")
            return inner(heads)
        if self._judges(heads, site, host, memory) or step.index < memory.first:
            return inner(heads)
        query_rate, kv_rate = self._rates(site, host, trace, memory)
        if not query_rate and not kv_rate:
            return inner(heads)
        trace.extras["asymrnr"]["rates"][site][step.index] = [query_rate, kv_rate]
        heads.watch, flops = memory.watch, [0, 0]
        queries, flops[0] = self._cut("query", heads, query_rate, site, host, memory)
        keys, flops[1] = (queries, 0) if self.plans == "one" else self._cut("kv", heads, kv_rate, site, host, memory)
        y = heads.restore(inner(self._shortened(heads, queries, keys)), queries)
        n, m = heads.shape[1], [len(cut.keep[0]) if cut else heads.shape[1] for cut in (queries, keys)]
        saved = (1 - m[0] * m[1] / n**2) * core_flops(host) + heads.spared - sum(flops)
        trace.record(step, site, "reduce", 1 - saved / trace.flops[site])
        if host.latents.device.type != "cuda":  # where this clock would only see the launches
            trace.extras["asymrnr"]["overhead_ms"] = round(1000 * memory.watch.seconds, 2)
        return y

    def _shortened(self, heads: Heads, queries: Reduction | None, keys: Reduction | None) -> Heads:
        rows = self.merge == "mean"
        q, k = heads.query(queries, rows), heads.key(keys, rows)
        bias = keys.bias(heads.shape[0], heads.shape[2]) if keys and self.bias else None
        return Heads(q, k, heads.value(keys, self.merge != "replace"), bias)

    def _judges(self, heads: Heads, site: str, host: Host, memory: Memory) -> bool:
        """Looks at likeness where it is asked for and not known yet; true while a block's is missing.

        That is in the last protected step, or later for a block that another method skipped there.
        """
        wanted = self.threshold > 0 if self.schedule == "fixed" else not memory.costs
        seen, sites = memory.likeness.setdefault(host.model, {}), host.attentions[host.model]
        if not wanted or host.step.index < memory.first - 1:
            return False
        if len(seen) == len(sites):  # both branches are reduced from the same step on
            return host.step.index == memory.judged[host.model]
        if site not in seen and host.step.branch == "cond":
            features = (("query", heads.query()), ("kv", heads.value()))
            with memory.watch:
                seen[site] = tuple(memory.plans.likeness(feature, x, host.grid) for feature, x in features)
            memory.judged[host.model] = host.step.index
        return True

    def _rates(self, site: str, host: Host, trace: Trace, memory: Memory) -> Pair:
        """Query and key/value rate of a site at this step; all sites' are settled at the first call."""
        if host.model not in memory.rates:
            rates = memory.rates[host.model] = self._settle(host, memory)
            self._tell(rates, host, trace, memory)
        spans = memory.rates[host.model][site]
        return spans[span_of(host.step.index, len(spans), host.step.count)]

    def _settle(self, host: Host, memory: Memory) -> Table:
        sites, seen = host.attentions[host.model], memory.likeness[host.model]
        most = memory.plans.partition("query", host.grid, host.latents.device).max_rate  # the keys' cells are as large
        if self.schedule == "fixed":
            if strange := sorted(set(self.rates) - set(sites)):
                raise ValueError(f"there is no attention {strange[0]!r} to give a rate; there are {', '.join(sites)}")
            none = [(0.0, 0.0)] if self.rates else [(self.query_rate, self.kv_rate)]
            pick = lambda pair, alike: tuple(min(r, most) * (a >= self.threshold) for r, a in zip(pair, alike))
            rates = {s: [pick(pair, seen.get(s, (1.0, 1.0))) for pair in self.rates.get(s, none)] for s in sites}
        else:
            costs = memory.costs or {site: [tuple(1 - a for a in seen[site])] for site in sites}
            ceilings = min(self.query_rate, most), min(self.kv_rate, most)
            rates = allocate(costs, self._target(host, memory), ceilings, host.step.count, memory.first)
        one = lambda pair: (1 - math.sqrt((1 - pair[0]) * (1 - pair[1])),) * 2  # one plan: the same work by one rate
        return {s: [one(pair) for pair in spans] for s, spans in rates.items()} if self.plans == "one" else rates

    def _target(self, host: Host, memory: Memory) -> float:
        """The budget in parts of the steps that are not protected."""
        return max(0.0, self.budget * host.step.count - memory.first) / (host.step.count - memory.first)

    def _tell(self, rates: Table, host: Host, trace: Trace, memory: Memory) -> None:
        """What is left of the attention work, if these rates hold to the end, as forecast; what is amiss, as notes."""
        told, now, count = trace.extras["asymrnr"], host.step.index, host.step.count
        before = [[(1 - q) * (1 - kv) for q, kv in steps[:now]] for steps in told["rates"].values()]
        to_come = work(rates, count, now)
        left = (sum(map(sum, before)) / len(before) + to_come * (count - now)) / count
        told["forecast"] = round(1 / (1 - told["core_share"] * (1 - left)), 3)
        if self.schedule == "fixed" and to_come == 1 and memory.likeness[host.model]:
            alike = max(max(pair) for pair in memory.likeness[host.model].values())
            trace.note(f"AsymRnR does nothing: the threshold is {self.threshold}, the most alike block has {alike:.2f}")
        elif self.schedule != "fixed" and work(rates, count, memory.first) > self._target(host, memory) + 0.02:
            trace.note(f"AsymRnR: the budget of {self.budget} is out of reach, {left:.2f} of the work is left")

    def _cut(
        self, feature: str, heads: Heads, rate: float, site: str, host: Host, memory: Memory
    ) -> tuple[Reduction | None, int]:
        """The reduction of a feature at its rate, none at rate 0, and the FLOPs of matching."""
        if not rate:
            return None, 0
        if memory.model != host.model:  # Wan 2.2 has changed to its second transformer
            memory.plans.clear()
            memory.model = host.model
        part = memory.plans.partition(feature, host.grid, host.latents.device)
        window = (host.step.index - memory.first) // memory.interval
        key, flops = (site, host.step.branch, feature), 0
        if memory.plans.due(key, window, heads.shape):
            x = heads.query() if feature == "query" else heads.value()
            with memory.watch:
                flops = memory.plans.match(key, window, x, part)
        with memory.watch:
            cut = memory.plans.cut(key, rate)
        host.trace.hold("asymrnr", memory.plans.held)
        if host.step.branch == "cond":
            self._show(feature, cut, site, host)
        return cut, flops

    def _show(self, feature: str, cut: Reduction, site: str, host: Host) -> None:
        """Which tokens of the middle frame stay when a block is cut first: rows of 0 and 1 for the page to draw."""
        shown = host.trace.extras["asymrnr"]["kept"].setdefault(site, {})
        if feature not in shown:
            f, h, w = host.grid
            stays = torch.zeros(f * h * w, dtype=torch.bool).index_fill(0, cut.keep[0].long().cpu(), True)
            shown[feature] = ["".join("01"[token] for token in row) for row in stays.view(f, h, w)[f // 2].tolist()]


def core_flops(host: Host) -> int:
    """Work of one whole attention core: the products of queries with keys, and of weights with values."""
    return 4 * len(host.latents) * math.prod(host.grid) ** 2 * host.family.width(host.models[host.model])
