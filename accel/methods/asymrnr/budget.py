"""One budget into rates: where removing tokens costs least, most are removed. Costs can be kept as JSON.

A *cost* says how much removing tokens harms at a site (a block's self-attention), for queries and for keys/values, per
span of the run (equal shares of its steps). The harm of a rate r is cost * r^2 / (1 - r): the first tokens have
close relatives, the last have none. Only the proportions of the costs matter.
"""

from __future__ import annotations

import heapq
from collections import Counter
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, Field, ValidationError

from ...files import atomic_write

Pair = tuple[float, float]  # of queries, of keys and values
Table = dict[str, list[Pair]]  # site -> per span
RATE_STEP = 0.05  # rates are multiples of this
MIN_RATE = 0.25  # but not below this: shortening by less costs about the time that it saves
PROFILE = "asymrnr.json"  # file of measured costs in a model's folder


def allocate(costs: Table, budget: float, ceilings: Pair, count: int = 1, first: int = 0) -> Table:
    """Rates that leave the share `budget` of the attention work of steps `first` to `count`, at the least harm found.

    Greedy: again and again the rate is raised that saves most work for its harm, up to the ceilings; if even these do
    not reach the budget, the ceilings are what comes back. Spans without such a step stay at 0.
    """
    steps = {layer: _lengths(len(spans), count, first) for layer, spans in costs.items()}
    rates = {(layer, span): [0.0, 0.0] for layer, held in steps.items() for span, n in enumerate(held) if n}

    def price(cell: tuple[str, int], which: int) -> float:
        """Harm for each unit of work saved by raising a rate by one rung; infinite beyond its ceiling."""
        now, other, cost = rates[cell][which], rates[cell][1 - which], costs[cell[0]][cell[1]][which]
        if (then := _next(now)) > ceilings[which] + 1e-9:
            return float("inf")
        return max(cost, 1e-6) * (penalty(then) - penalty(now)) / ((then - now) * (1 - other))

    queue = [(price(cell, which), cell, which) for cell in rates for which in (0, 1)]
    heapq.heapify(queue)
    surplus = len(costs) * (count - first) * (1 - budget)
    while surplus > 1e-9 and queue[0][0] < float("inf"):
        _, cell, which = queue[0]
        current = price(cell, which)
        if current <= queue[0][0] * (1 + 1e-9):  # else the cell's other rate has risen since, and this one saves less
            now, then = rates[cell][which], _next(rates[cell][which])
            surplus -= (then - now) * (1 - rates[cell][1 - which]) * steps[cell[0]][cell[1]]
            rates[cell][which] = then
            current = price(cell, which)
        heapq.heapreplace(queue, (current, cell, which))
    return {
        layer: [tuple(rates.get((layer, s), (0.0, 0.0))) for s in range(len(held))] for layer, held in steps.items()
    }


def allocate_all_or_none(
    costs: Table, budget: float, ceilings: Pair, count: int, first: int, full_share: float
) -> Table:
    """Rates as those of `allocate` where a reduced attention also runs whole in the share `whole` of its steps.

    What it misses is then carried, and errors hardly depend on the rate: sites and spans are reduced at the ceilings or
    not at all, the cheapest first, until the budget is met. None are if that would save nothing.
    """
    lengths = {layer: _lengths(len(spans), count, first) for layer, spans in costs.items()}
    rates = {layer: [(0.0, 0.0)] * len(spans) for layer, spans in costs.items()}
    surplus, saved = len(costs) * (count - first) * (1 - budget), 1 - remaining_work(ceilings, full_share)
    cells = [(layer, span) for layer, spans in costs.items() for span in range(len(spans))]
    for layer, span in sorted(cells, key=lambda cell: sum(costs[cell[0]][cell[1]])):
        if surplus > 1e-9 and saved > 0 and lengths[layer][span]:
            rates[layer][span] = ceilings
            surplus -= saved * lengths[layer][span]
    return rates


def remaining_work(pair: Pair, full_share: float = 0.0) -> float:
    """The share of an attention's work that is left at a pair of rates, if it also runs `whole` in a share of steps."""
    return (1 - pair[0]) * (1 - pair[1]) + full_share if max(pair) else 1.0


def _next(rate: float) -> float:
    """The next rung of the ladder of rates."""
    return round(max(MIN_RATE, rate + RATE_STEP), 6)


def penalty(rate: float) -> float:
    """What removing a share of the tokens does, in parts of its cost."""
    return rate**2 / (1 - rate)


def phase_of(step: int, spans: int, count: int) -> int:
    """Which of so many spans a step of a run of `count` falls into."""
    return step * spans // count


def _lengths(spans: int, count: int, first: int) -> list[int]:
    """How many of the steps from `first` on fall into each span."""
    falls = Counter(phase_of(step, spans, count) for step in range(first, count))
    return [falls[span] for span in range(spans)]


def work(rates: Table, count: int = 1, first: int = 0, full_share: float = 0.0) -> float:
    """Mean share of the attention work that is left, over sites and steps `first` to `count`."""
    left = [[remaining_work(pair, full_share) for pair in spans] for spans in rates.values()]
    each = [layer[phase_of(step, len(layer), count)] for layer in left for step in range(first, count)]
    return sum(each) / len(each)


class Profile(BaseModel, frozen=True, extra="forbid"):
    """Measured costs of a model's attentions, per span of the steps, and how they were measured."""

    grid: tuple[int, int, int]  # tokens (f, h, w)
    steps: int
    rate: float
    costs: dict[str, Annotated[list[Pair], Field(min_length=1)]]

    def save(self, path: Path) -> None:
        """Write it as JSON, whole or not at all."""
        with atomic_write(path) as part:
            part.write_text(self.model_dump_json(indent=1) + "\n")


def load_profile(path: str | Path, layers: list[str]) -> Profile:
    """The profile in a file. Raises ValueError if there is none or it is of a model with other blocks."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"profile {str(path)!r} does not exist: give the path of a JSON file, or leave it empty")
    try:
        profile = Profile.model_validate_json(path.read_text())
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{path.name} is no profile: {'.'.join(map(str, first['loc']))} {first['msg']}") from None
    if sorted(profile.costs) != sorted(layers):
        found = len(profile.costs)
        raise ValueError(f"profile {path.name} is of a model with {found} attentions, this one has {len(layers)}")
    return profile
