"""Turns one budget into rates: most tokens are removed where that costs least. Measured costs are stored as JSON.

A *cost* says how much removing tokens harms in a layer (a block's self-attention), for queries and for keys/values, in
each phase of the run (equal shares of its steps). The penalty of a rate r is cost * r^2 / (1 - r): the first removed
tokens have similar ones that remain, the last have none. Only the proportions of the costs matter.
"""

from __future__ import annotations

import heapq
import os
from collections import Counter
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, Field

from ...errors import AccelError, amount, quote
from ...files import atomic_write, read_model

Pair = tuple[float, float]  # of queries, of keys and values
Table = dict[str, list[Pair]]  # layer -> one pair for each phase
RATE_STEP = 0.05  # rates are multiples of this
MIN_RATE = 0.25  # but not below this: removing fewer tokens costs about the time that it saves
PROFILE = "asymrnr.json"  # file of measured costs in a model's folder


def allocate(costs: Table, budget: float, ceilings: Pair, count: int = 1, first: int = 0) -> Table:
    """Rates that leave the share `budget` of the attention work of steps `first` to `count`, at little total penalty.

    Greedy: the rate that saves most work for its penalty is raised again and again, up to the ceilings. If the budget
    is out of reach, all rates are at the ceilings. Phases without such a step stay at 0.
    """
    lengths = {layer: _phase_lengths(len(phases), count, first) for layer, phases in costs.items()}
    rates = {(layer, phase): [0.0, 0.0] for layer, steps in lengths.items() for phase, n in enumerate(steps) if n}

    def price(cell: tuple[str, int], which: int) -> float:
        """Penalty for each unit of work saved by raising a rate by one step; infinite beyond its ceiling."""
        rate, other, cost = rates[cell][which], rates[cell][1 - which], costs[cell[0]][cell[1]][which]
        if (raised := _next(rate)) > ceilings[which] + 1e-9:
            return float("inf")
        return max(cost, 1e-6) * (penalty(raised) - penalty(rate)) / ((raised - rate) * (1 - other))

    queue = [(price(cell, which), cell, which) for cell in rates for which in (0, 1)]
    heapq.heapify(queue)
    surplus = len(costs) * (count - first) * (1 - budget)
    while surplus > 1e-9 and queue[0][0] < float("inf"):
        _, cell, which = queue[0]
        current = price(cell, which)
        if current <= queue[0][0] * (1 + 1e-9):  # else the cell's other rate has risen since, and this one saves less
            rate, raised = rates[cell][which], _next(rates[cell][which])
            surplus -= (raised - rate) * (1 - rates[cell][1 - which]) * lengths[cell[0]][cell[1]]
            rates[cell][which] = raised
            current = price(cell, which)
        heapq.heapreplace(queue, (current, cell, which))
    return {
        layer: [tuple(rates.get((layer, phase), (0.0, 0.0))) for phase in range(len(steps))]
        for layer, steps in lengths.items()
    }


def allocate_all_or_none(
    costs: Table, budget: float, ceilings: Pair, count: int, first: int, full_share: float
) -> Table:
    """Rates like those of `allocate`, for reduced attentions that also run full in the share `full_share` of the steps.

    Their error is corrected then and hardly depends on the rate. So layers and phases are reduced at the ceilings or
    not at all, the cheapest first, until the budget is met. If that would save nothing, no layer is reduced.
    """
    lengths = {layer: _phase_lengths(len(phases), count, first) for layer, phases in costs.items()}
    rates = {layer: [(0.0, 0.0)] * len(phases) for layer, phases in costs.items()}
    surplus, saved = len(costs) * (count - first) * (1 - budget), 1 - remaining_work(ceilings, full_share)
    cells = [(layer, phase) for layer, phases in costs.items() for phase in range(len(phases))]
    for layer, phase in sorted(cells, key=lambda cell: sum(costs[cell[0]][cell[1]])):
        if surplus > 1e-9 and saved > 0 and lengths[layer][phase]:
            rates[layer][phase] = ceilings
            surplus -= saved * lengths[layer][phase]
    return rates


def remaining_work(pair: Pair, full_share: float = 0.0) -> float:
    """Share of an attention's work that is left at two rates, if it also runs full in `full_share` of the steps."""
    return (1 - pair[0]) * (1 - pair[1]) + full_share if max(pair) else 1.0


def mean_work(rates: Table, count: int = 1, first: int = 0, full_share: float = 0.0) -> float:
    """Mean share of the attention work that is left, over layers and steps `first` to `count`."""
    left = [[remaining_work(pair, full_share) for pair in phases] for phases in rates.values()]
    shares = [layer[phase_of(step, len(layer), count)] for layer in left for step in range(first, count)]
    return sum(shares) / len(shares)


def _next(rate: float) -> float:
    """The next higher rate."""
    return round(max(MIN_RATE, rate + RATE_STEP), 6)


def penalty(rate: float) -> float:
    """The harm of removing a share of the tokens, as a multiple of the cost."""
    return rate**2 / (1 - rate)


def phase_of(step: int, phases: int, count: int) -> int:
    """The phase, of `phases` equal ones, that a step of a run of `count` steps falls into."""
    return step * phases // count


def _phase_lengths(phases: int, count: int, first: int) -> list[int]:
    """How many of the steps from `first` on fall into each phase."""
    steps = Counter(phase_of(step, phases, count) for step in range(first, count))
    return [steps[phase] for phase in range(phases)]


class Profile(BaseModel, frozen=True, extra="forbid"):
    """Measured costs of a model's attentions in each phase of the steps, and how they were measured."""

    grid: tuple[int, int, int]  # tokens (f, h, w)
    steps: int
    rate: float  # at which the costs were measured
    costs: dict[str, Annotated[list[Pair], Field(min_length=1)]]

    def save(self, path: Path) -> None:
        """Write it as JSON, atomically."""
        with atomic_write(path) as part:
            part.write_text(self.model_dump_json(indent=1) + "\n")


def read_profile(path: Path) -> Profile:
    """The profile in a file. Raises AccelError if there is no such file or it is not a profile."""
    if not os.path.isfile(path):  # false for what cannot be a path, too
        raise AccelError(f"profile {quote(str(path))} does not exist: give the path of a JSON file, or leave it empty")
    return read_model(Profile, path, "profile")


def load_profile(path: Path, layers: list[str]) -> Profile:
    """The profile in a file, for a model with these layers. Raises AccelError if it is of another model."""
    profile = read_profile(path)
    if sorted(profile.costs) != sorted(layers):
        found = len(profile.costs)
        raise AccelError(
            f"profile {path.name} is of a model with {amount(found, 'attention')}, this one has {len(layers)}"
        )
    return profile
