"""Decides which share of the tokens AsymRnR removes at each layer and step: from one budget, or by fixed rates."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ...core.attention import QKV
from ...core.host import Host
from ...errors import AccelError
from ...students.euler_scheduler import is_student_run
from .budget import (
    PROFILE,
    Pair,
    Table,
    allocate,
    allocate_all_or_none,
    load_profile,
    mean_work,
    phase_of,
    remaining_work,
)
from .plan_cache import PlanCache

if TYPE_CHECKING:
    from .asymrnr import AsymRnR


@dataclass
class RateSchedule:
    """The rates of one run. Those of all layers of a transformer are chosen at its first reduced attention."""

    config: AsymRnR
    host: Host
    plans: PlanCache
    first: int  # step from which tokens may be removed
    full_share: float  # share of the steps in which a reduced attention also runs full; 0 without correction
    costs: Table = field(default_factory=dict)
    rates_by_model: dict[int, Table] = field(default_factory=dict)  # by index of the transformer
    similarity: dict[int, dict[str, Pair]] = field(default_factory=dict)  # of queries and values, by transformer, layer
    similarity_step: dict[int, int] = field(default_factory=dict)  # step of the last measurement, by transformer

    @property
    def layers(self) -> list[str]:
        """The attentions of the transformer that runs."""
        return list(self.host.attentions[self.host.active_index])

    def check_layers(self) -> None:
        """Raise AccelError if the given rates or profile are of another model, also if this run does not use them."""
        if unknown := sorted(set(self.config.rates) - set(self.layers)):
            raise AccelError(f"there is no attention {unknown[0]!r} to give a rate; there are {', '.join(self.layers)}")
        if self.config.profile:
            load_profile(Path(self.config.profile), self.layers)

    def load_costs(self, model_dir: str) -> None:
        """Load the costs of the given profile, or of the one in the model's folder; without any, say so."""
        default, trace, host = Path(model_dir) / PROFILE, self.host.trace, self.host
        if not self.config.profile and not default.is_file():
            trace.add_message(
                "AsymRnR distributes its budget by similarity: this model has no profile (python -m accel profile)"
            )
            return
        profile = load_profile(Path(self.config.profile or default), self.layers)
        if is_student_run(host.pipe):
            trace.add_message("AsymRnR: the costs were measured without the student that runs")
        if profile.grid != host.grid:
            trace.add_message(
                f"AsymRnR: the costs were measured on a grid of {profile.grid} tokens, this one is {host.grid}"
            )
        self.costs = profile.costs

    def is_active(self, qkv: QKV, layer: str) -> bool:
        """Whether tokens may be removed at this layer and step."""
        return not self._measure_similarity(qkv, layer) and self.host.step.index >= self.first

    def rates(self, layer: str) -> Pair:
        """The rates of queries and of keys and values in a layer at this step."""
        host = self.host
        if host.active_index not in self.rates_by_model:
            self.rates_by_model[host.active_index] = self._choose_rates()
            self._report(self.rates_by_model[host.active_index])
        phases = self.rates_by_model[host.active_index][layer]
        return phases[phase_of(host.step.index, len(phases), host.step.count)]

    def _measure_similarity(self, qkv: QKV, layer: str) -> bool:
        """Measure a layer's similarity if it is needed and unknown; True until the step after the last measurement.

        That happens in the last step before the first reduced one, or later if another method skips the layer there.
        """
        host, config, layers = self.host, self.config, self.layers
        needed = config.threshold > 0 if config.schedule == "fixed" else not self.costs
        known = self.similarity.setdefault(host.active_index, {})
        if not needed or host.step.index < self.first - 1:
            return False
        if len(known) == len(layers):  # both branches are reduced from the same step on
            return host.step.index == self.similarity_step[host.active_index]
        if layer not in known and host.step.branch == "cond":
            features = (("query", qkv.query()), ("kv", qkv.value()))
            with qkv.timer:
                measured = [self.plans.similarity(feature, x, host.grid) for feature, x in features]
            known[layer], flops = tuple(similarity for similarity, _ in measured), sum(n for _, n in measured)
            host.trace.record(host.step, layer, "compute", 1 + flops / host.trace.flops[layer])
            self.similarity_step[host.active_index] = host.step.index
        return True

    def _choose_rates(self) -> Table:
        rates = self._fixed_rates() if self.config.schedule == "fixed" else self._allocated_rates()
        if self.config.pairing != "one":
            return rates
        single = lambda pair: 1 - math.sqrt((1 - pair[0]) * (1 - pair[1]))  # one rate that leaves the same work
        return {layer: [(single(pair),) * 2 for pair in phases] for layer, phases in rates.items()}

    def _max_rate(self) -> float:
        """The highest rate that the cells allow, of queries and of keys alike."""
        return self.plans.partition("query", self.host.grid, self.host.latents.device).max_rate

    def _fixed_rates(self) -> Table:
        config, most, known = self.config, self._max_rate(), self.similarity[self.host.active_index]
        default = [(0.0, 0.0)] if config.rates else [(config.query_rate, config.kv_rate)]

        def limit(pair: Pair, similarity: Pair) -> Pair:
            return tuple(min(rate, most) * (s >= config.threshold) for rate, s in zip(pair, similarity))

        return {
            layer: [limit(pair, known.get(layer, (1.0, 1.0))) for pair in config.rates.get(layer, default)]
            for layer in self.layers
        }

    def _allocated_rates(self) -> Table:
        config, most, known = self.config, self._max_rate(), self.similarity[self.host.active_index]
        ceilings = min(config.query_rate, most), min(config.kv_rate, most)
        costs = self.costs or {layer: [tuple(1 - s for s in known[layer])] for layer in self.layers}
        given = costs, self._target(), ceilings, self.host.step.count, self.first
        return allocate_all_or_none(*given, self.full_share) if self.full_share else allocate(*given)

    def _target(self) -> float:
        """The budget as a share of the work of the steps that may be reduced."""
        count = self.host.step.count
        return max(0.0, self.config.budget * count - self.first) / (count - self.first)

    def _report(self, rates: Table) -> None:
        """Write the forecast speed-up to the trace, and a message if the threshold or the budget cannot be met."""
        trace, current, count = self.host.trace, self.host.step.index, self.host.step.count
        data, known, config = trace.method_data["asymrnr"], self.similarity[self.host.active_index], self.config
        done = [[remaining_work(pair) for pair in steps[:current]] for steps in data["rates"].values()]
        to_come = mean_work(rates, count, current, self.full_share)
        left = (sum(map(sum, done)) / len(done) + to_come * (count - current)) / count
        data["forecast"] = round(1 / (1 - data["core_share"] * (1 - left)), 3)
        if config.schedule == "fixed" and to_come == 1 and known:
            most = max(max(pair) for pair in known.values())
            trace.add_message(
                f"AsymRnR does nothing: the threshold is {config.threshold}, the highest similarity is {most:.2f}"
            )
        elif (
            config.schedule != "fixed" and mean_work(rates, count, self.first, self.full_share) > self._target() + 0.02
        ):
            trace.add_message(f"AsymRnR: the budget of {config.budget} is out of reach, {left:.2f} of the work is left")
