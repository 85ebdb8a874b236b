"""Which share of the tokens AsymRnR removes where: one budget, or fixed rates, as a rate for each site and step."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import BaseModel

from ...core.attention import QKV
from ...core.host import Host
from ...students.scheduler import is_student_run
from .budget import PROFILE, Pair, Table, allocate, allocate_all_or_none, load_profile, phase_of, remaining_work, work
from .matching import PlanCache


@dataclass
class RateSchedule:
    """The rates of one run. They are settled at the first attention that may be reduced, for all of a transformer's."""

    config: BaseModel  # AsymRnR's
    host: Host
    plans: PlanCache
    first: int  # step from which tokens may be removed
    whole: float  # share of the steps in which a reduced attention also runs whole; 0: nothing is carried
    costs: Table = field(default_factory=dict)
    settled: dict[int, Table] = field(default_factory=dict)  # by transformer
    similarity: dict[int, dict[str, Pair]] = field(
        default_factory=dict
    )  # of queries and values, by transformer and site
    judged: dict[int, int] = field(default_factory=dict)  # step in which the last of these was found, by transformer

    def read(self, place: str) -> None:
        """Take the costs of the profile that was given, or of the model's own; none if it has none, which is said."""
        own, trace, host = Path(place) / PROFILE, self.host.trace, self.host
        if not self.config.profile and not own.is_file():
            trace.add_message(
                "AsymRnR judges the blocks by likeness: no profile of this model (python -m accel profile)"
            )
            return
        profile = load_profile(self.config.profile or own, list(host.attentions[host.active_index]))
        if is_student_run(host.pipe):
            trace.add_message("AsymRnR: the costs were measured without the student that runs")
        if profile.grid != host.grid:
            trace.add_message(
                f"AsymRnR: the costs were measured on a grid of {profile.grid} tokens, this one is {host.grid}"
            )
        self.costs = profile.costs

    def acts(self, qkv: QKV, layer: str) -> bool:
        """Whether tokens may be removed at this site and step."""
        return not self._judges(qkv, layer) and self.host.step.index >= self.first

    def _judges(self, qkv: QKV, layer: str) -> bool:
        """Looks at likeness where it is asked for and not known yet; true while a block's is missing.

        That is in the last protected step, or later for a block that another method skipped there.
        """
        host, config = self.host, self.config
        wanted = config.threshold > 0 if config.schedule == "fixed" else not self.costs
        seen, layers = self.similarity.setdefault(host.active_index, {}), host.attentions[host.active_index]
        if not wanted or host.step.index < self.first - 1:
            return False
        if len(seen) == len(layers):  # both branches are reduced from the same step on
            return host.step.index == self.judged[host.active_index]
        if layer not in seen and host.step.branch == "cond":
            features = (("query", qkv.query()), ("kv", qkv.value()))
            with qkv.timer:
                found = [self.plans.similarity(feature, x, host.grid) for feature, x in features]
            seen[layer], spent = tuple(alike for alike, _ in found), sum(flops for _, flops in found)
            host.trace.record(host.step, layer, "compute", 1 + spent / host.trace.flops[layer])
            self.judged[host.active_index] = host.step.index
        return True

    def rates(self, layer: str) -> Pair:
        """Query and key/value rate of a site at this step."""
        host = self.host
        if host.active_index not in self.settled:
            self.settled[host.active_index] = self._settle()
            self._tell(self.settled[host.active_index])
        spans = self.settled[host.active_index][layer]
        return spans[phase_of(host.step.index, len(spans), host.step.count)]

    def _settle(self) -> Table:
        rates = self._fixed() if self.config.schedule == "fixed" else self._spread()
        one = lambda pair: (1 - math.sqrt((1 - pair[0]) * (1 - pair[1])),) * 2  # one plan: the same work by one rate
        return (
            {s: [one(pair) for pair in spans] for s, spans in rates.items()} if self.config.pairing == "one" else rates
        )

    def _most(self) -> float:
        """The highest rate that the cells allow; those of the keys are as large."""
        return self.plans.partition("query", self.host.grid, self.host.latents.device).max_rate

    def _fixed(self) -> Table:
        config, layers, most = self.config, self.host.attentions[self.host.active_index], self._most()
        seen = self.similarity[self.host.active_index]
        if strange := sorted(set(config.rates) - set(layers)):
            raise ValueError(f"there is no attention {strange[0]!r} to give a rate; there are {', '.join(layers)}")
        others = [(0.0, 0.0)] if config.rates else [(config.query_rate, config.kv_rate)]
        pick = lambda pair, alike: tuple(min(r, most) * (a >= config.threshold) for r, a in zip(pair, alike))
        return {s: [pick(pair, seen.get(s, (1.0, 1.0))) for pair in config.rates.get(s, others)] for s in layers}

    def _spread(self) -> Table:
        config, most, seen = self.config, self._most(), self.similarity[self.host.active_index]
        layers = self.host.attentions[self.host.active_index]
        ceilings, steps = (
            (min(config.query_rate, most), min(config.kv_rate, most)),
            (self.host.step.count, self.first),
        )
        costs = self.costs or {layer: [tuple(1 - a for a in seen[layer])] for layer in layers}
        if self.whole:
            return allocate_all_or_none(costs, self._target(), ceilings, *steps, self.whole)
        return allocate(costs, self._target(), ceilings, *steps)

    def _target(self) -> float:
        """The budget in parts of the steps that are not protected."""
        count = self.host.step.count
        return max(0.0, self.config.budget * count - self.first) / (count - self.first)

    def _tell(self, rates: Table) -> None:
        """What is left of the attention work, if these rates hold to the end, as forecast; what is amiss, as notes."""
        trace, now, count = self.host.trace, self.host.step.index, self.host.step.count
        told, seen, config = trace.method_data["asymrnr"], self.similarity[self.host.active_index], self.config
        before = [[remaining_work(pair) for pair in steps[:now]] for steps in told["rates"].values()]
        to_come = work(rates, count, now, self.whole)
        left = (sum(map(sum, before)) / len(before) + to_come * (count - now)) / count
        told["forecast"] = round(1 / (1 - told["core_share"] * (1 - left)), 3)
        if config.schedule == "fixed" and to_come == 1 and seen:
            alike = max(max(pair) for pair in seen.values())
            trace.add_message(
                f"AsymRnR does nothing: the threshold is {config.threshold}, the most alike block has {alike:.2f}"
            )
        elif config.schedule != "fixed" and work(rates, count, self.first, self.whole) > self._target() + 0.02:
            trace.add_message(f"AsymRnR: the budget of {config.budget} is out of reach, {left:.2f} of the work is left")
