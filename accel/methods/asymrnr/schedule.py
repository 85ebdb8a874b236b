"""Which share of the tokens AsymRnR removes where: one budget, or fixed rates, as a rate for each site and step."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import BaseModel

from ...core.attention import Heads
from ...core.host import Host
from ...students.scheduler import by_student
from .budget import PROFILE, Pair, Table, allocate, choose, left_of, load_profile, span_of, work
from .matching import PlanCache


@dataclass
class Schedule:
    """The rates of one run. They are settled at the first attention that may be reduced, for all of a transformer's."""

    knobs: BaseModel  # AsymRnR's
    host: Host
    plans: PlanCache
    first: int  # step from which tokens may be removed
    whole: float  # share of the steps in which a reduced attention also runs whole; 0: nothing is carried
    costs: Table = field(default_factory=dict)
    settled: dict[int, Table] = field(default_factory=dict)  # by transformer
    likeness: dict[int, dict[str, Pair]] = field(default_factory=dict)  # of queries and values, by transformer and site
    judged: dict[int, int] = field(default_factory=dict)  # step in which the last of these was found, by transformer

    def read(self, place: str) -> None:
        """Take the costs of the profile that was given, or of the model's own; none if it has none, which is said."""
        own, trace, host = Path(place) / PROFILE, self.host.trace, self.host
        if not self.knobs.profile and not own.is_file():
            trace.note("AsymRnR judges the blocks by likeness: no profile of this model (python -m accel profile)")
            return
        profile = load_profile(self.knobs.profile or own, list(host.attentions[host.model]))
        if by_student(host.pipe):
            trace.note("AsymRnR: the costs were measured without the student that runs")
        if profile.grid != host.grid:
            trace.note(f"AsymRnR: the costs were measured on a grid of {profile.grid} tokens, this one is {host.grid}")
        self.costs = profile.costs

    def acts(self, heads: Heads, site: str) -> bool:
        """Whether tokens may be removed at this site and step."""
        return not self._judges(heads, site) and self.host.step.index >= self.first

    def _judges(self, heads: Heads, site: str) -> bool:
        """Looks at likeness where it is asked for and not known yet; true while a block's is missing.

        That is in the last protected step, or later for a block that another method skipped there.
        """
        host, knobs = self.host, self.knobs
        wanted = knobs.threshold > 0 if knobs.schedule == "fixed" else not self.costs
        seen, sites = self.likeness.setdefault(host.model, {}), host.attentions[host.model]
        if not wanted or host.step.index < self.first - 1:
            return False
        if len(seen) == len(sites):  # both branches are reduced from the same step on
            return host.step.index == self.judged[host.model]
        if site not in seen and host.step.branch == "cond":
            features = (("query", heads.query()), ("kv", heads.value()))
            with heads.watch:
                found = [self.plans.likeness(feature, x, host.grid) for feature, x in features]
            seen[site], spent = tuple(alike for alike, _ in found), sum(flops for _, flops in found)
            host.trace.record(host.step, site, "compute", 1 + spent / host.trace.flops[site])
            self.judged[host.model] = host.step.index
        return True

    def rates(self, site: str) -> Pair:
        """Query and key/value rate of a site at this step."""
        host = self.host
        if host.model not in self.settled:
            self.settled[host.model] = self._settle()
            self._tell(self.settled[host.model])
        spans = self.settled[host.model][site]
        return spans[span_of(host.step.index, len(spans), host.step.count)]

    def _settle(self) -> Table:
        rates = self._fixed() if self.knobs.schedule == "fixed" else self._spread()
        one = lambda pair: (1 - math.sqrt((1 - pair[0]) * (1 - pair[1])),) * 2  # one plan: the same work by one rate
        return {s: [one(pair) for pair in spans] for s, spans in rates.items()} if self.knobs.plans == "one" else rates

    def _most(self) -> float:
        """The highest rate that the cells allow; those of the keys are as large."""
        return self.plans.partition("query", self.host.grid, self.host.latents.device).max_rate

    def _fixed(self) -> Table:
        knobs, sites, most = self.knobs, self.host.attentions[self.host.model], self._most()
        seen = self.likeness[self.host.model]
        if strange := sorted(set(knobs.rates) - set(sites)):
            raise ValueError(f"there is no attention {strange[0]!r} to give a rate; there are {', '.join(sites)}")
        others = [(0.0, 0.0)] if knobs.rates else [(knobs.query_rate, knobs.kv_rate)]
        pick = lambda pair, alike: tuple(min(r, most) * (a >= knobs.threshold) for r, a in zip(pair, alike))
        return {s: [pick(pair, seen.get(s, (1.0, 1.0))) for pair in knobs.rates.get(s, others)] for s in sites}

    def _spread(self) -> Table:
        knobs, most, seen = self.knobs, self._most(), self.likeness[self.host.model]
        sites = self.host.attentions[self.host.model]
        ceilings, steps = (min(knobs.query_rate, most), min(knobs.kv_rate, most)), (self.host.step.count, self.first)
        costs = self.costs or {site: [tuple(1 - a for a in seen[site])] for site in sites}
        if self.whole:
            return choose(costs, self._target(), ceilings, *steps, self.whole)
        return allocate(costs, self._target(), ceilings, *steps)

    def _target(self) -> float:
        """The budget in parts of the steps that are not protected."""
        count = self.host.step.count
        return max(0.0, self.knobs.budget * count - self.first) / (count - self.first)

    def _tell(self, rates: Table) -> None:
        """What is left of the attention work, if these rates hold to the end, as forecast; what is amiss, as notes."""
        trace, now, count = self.host.trace, self.host.step.index, self.host.step.count
        told, seen, knobs = trace.extras["asymrnr"], self.likeness[self.host.model], self.knobs
        before = [[left_of(pair) for pair in steps[:now]] for steps in told["rates"].values()]
        to_come = work(rates, count, now, self.whole)
        left = (sum(map(sum, before)) / len(before) + to_come * (count - now)) / count
        told["forecast"] = round(1 / (1 - told["core_share"] * (1 - left)), 3)
        if knobs.schedule == "fixed" and to_come == 1 and seen:
            alike = max(max(pair) for pair in seen.values())
            trace.note(
                f"AsymRnR does nothing: the threshold is {knobs.threshold}, the most alike block has {alike:.2f}"
            )
        elif knobs.schedule != "fixed" and work(rates, count, self.first, self.whole) > self._target() + 0.02:
            trace.note(f"AsymRnR: the budget of {knobs.budget} is out of reach, {left:.2f} of the work is left")
