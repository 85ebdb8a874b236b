"""Plans that are kept: matched once for a window of steps or a run, cut anew only when the rate or the plan changes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from ...ops.tokens import MergePlan, Metric, Partition, Reduction, grid_plan, match, partition

Matching = Literal["cell", "global", "grid"]
SEEDS = {"query": 0, "kv": 1}  # of the partitions, shared by both guidance branches


@dataclass
class PlanCache:
    """The plans and reductions of one run, by whatever key tells attentions, branches and features apart."""

    cell: tuple[int, ...]
    matching: Matching
    metric: Metric
    shared: bool  # one plan for all heads
    partitions: dict[tuple, Partition] = field(default_factory=dict)
    plans: dict[tuple, tuple[int, MergePlan]] = field(default_factory=dict)  # with the window they are of
    cuts: dict[tuple, tuple[MergePlan, float, Reduction]] = field(default_factory=dict)
    held: int = 0  # bytes of all plans and reductions; counted when one changes, not at every attention

    def partition(self, feature: str, grid: tuple[int, int, int], device: torch.device) -> Partition:
        """The cells of queries ("query") or of keys and values ("kv")."""
        if (feature, grid) not in self.partitions:
            self.partitions[feature, grid] = partition(grid, self.cell, SEEDS[feature], device)
        return self.partitions[feature, grid]

    def due(self, key: tuple, window: int, shape: tuple[int, ...]) -> bool:
        """Whether features of `shape` (b, n, h, d) have to be matched: these have no plan of this window of steps."""
        known, plan = self.plans.get(key, (-1, None))
        return known != window or len(plan.order) != self._groups(shape)

    def match(self, key: tuple, window: int, x: Tensor, part: Partition) -> int:
        """Find the plan of a window from features x (b, n, h, d); the FLOPs of it."""
        self.plans[key] = (window, self._match(x, part))
        return self._flops(x, part)

    def cut(self, key: tuple, rate: float) -> Reduction:
        """The reduction at a rate, by the plan that was found."""
        plan = self.plans[key][1]
        cut_of, cut_at, cut = self.cuts.get(key, (None, 0.0, None))
        if cut_of is not plan or cut_at != rate:
            cut = plan.at_rate(rate)
            self.cuts[key] = (plan, rate, cut)
            self.held = self._bytes()
        return cut

    def similarity(self, feature: str, x: Tensor, grid: tuple[int, int, int]) -> tuple[float, int]:
        """How alike features are to what they would merge into (0: as random, 1: the same), and the FLOPs of it."""
        part = self.partition(feature, grid, x.device)
        return self._match(x, part).similarity.mean().item(), self._flops(x, part)

    def clear(self) -> None:
        """Forget all plans: another transformer takes over."""
        self.plans.clear()
        self.cuts.clear()
        self.held = 0

    def _bytes(self) -> int:
        plans = sum(t.nbytes for _, plan in self.plans.values() for t in (plan.order, plan.destination_index))
        return plans + sum(cut.nbytes for *_, cut in self.cuts.values())

    def _groups(self, shape: tuple[int, ...]) -> int:
        return shape[0] if self.shared else shape[0] * shape[2]

    def _match(self, x: Tensor, part: Partition) -> MergePlan:
        if self.matching == "grid":
            return grid_plan(part, self._groups(x.shape))
        return match(x, part, self.metric, self.matching == "global", self.shared)

    def _flops(self, x: Tensor, part: Partition) -> int:
        """Work of the one matrix product that matching may need; by cell it needs none."""
        return 2 * len(part.destinations) * len(part.sources) * x[:, 0].numel() * (self.matching == "global")
