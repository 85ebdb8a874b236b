"""Caches matchings for a window of steps or a run, and the reductions made from them until the rate changes."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...ops.token_matching import MergePlan, Metric, Partition, Reduction, grid_plan, match, partition
from .asymrnr import Matching

SEEDS = {"query": 0, "kv": 1}  # of the partitions; both guidance branches share them


@dataclass
class PlanCache:
    """The merge plans and reductions of one run, by a key that names layer, branch, sample and feature."""

    cell: tuple[int, ...]
    matching: Matching
    metric: Metric
    shared: bool  # one plan for all heads
    partitions: dict[tuple, Partition] = field(default_factory=dict)
    plans: dict[tuple, tuple[int, MergePlan]] = field(default_factory=dict)  # (window of steps, plan)
    reductions: dict[tuple, tuple[MergePlan, float, Reduction]] = field(default_factory=dict)  # with plan and rate
    nbytes: int = 0  # of all plans and reductions; counted when one changes, not at every attention

    def partition(self, feature: str, grid: tuple[int, int, int], device: torch.device) -> Partition:
        """The cells of queries ("query") or of keys and values ("kv")."""
        if (feature, grid) not in self.partitions:
            self.partitions[feature, grid] = partition(grid, self.cell, SEEDS[feature], device)
        return self.partitions[feature, grid]

    def needs_matching(self, key: tuple, window: int, shape: tuple[int, ...]) -> bool:
        """Whether there is no plan of this window of steps for features of `shape` (b, n, k, d)."""
        cached_window, plan = self.plans.get(key, (-1, None))
        return cached_window != window or len(plan.order) != self._groups(shape)

    def match(self, key: tuple, window: int, x: Tensor, part: Partition) -> int:
        """Match features x (b, n, k, d) and cache the plan for a window of steps; returns the FLOPs."""
        self.plans[key] = (window, self._match(x, part))
        return self._flops(x, part)

    def at_rate(self, key: tuple, rate: float) -> Reduction:
        """The reduction by the cached plan that removes the share `rate` of the tokens."""
        plan = self.plans[key][1]
        cached_plan, cached_rate, reduction = self.reductions.get(key, (None, 0.0, None))
        if cached_plan is not plan or cached_rate != rate:
            reduction = plan.at_rate(rate)
            self.reductions[key] = (plan, rate, reduction)
            self.nbytes = self._count_bytes()
        return reduction

    def similarity(self, feature: str, x: Tensor, grid: tuple[int, int, int]) -> tuple[float, int]:
        """Mean similarity of features x (b, n, k, d) to their destinations (0: random, 1: equal), and the FLOPs."""
        part = self.partition(feature, grid, x.device)
        return self._match(x, part).similarity.mean().item(), self._flops(x, part)

    def clear(self) -> None:
        """Drop all plans and reductions."""
        self.plans.clear()
        self.reductions.clear()
        self.nbytes = 0

    def _count_bytes(self) -> int:
        plans = sum(t.nbytes for _, plan in self.plans.values() for t in (plan.order, plan.destination_index))
        return plans + sum(reduction.nbytes for *_, reduction in self.reductions.values())

    def _groups(self, shape: tuple[int, ...]) -> int:
        return shape[0] if self.shared else shape[0] * shape[2]

    def _match(self, x: Tensor, part: Partition) -> MergePlan:
        if self.matching == "grid":
            return grid_plan(part, self._groups(x.shape))
        return match(x, part, self.metric, self.matching == "global", self.shared)

    def _flops(self, x: Tensor, part: Partition) -> int:
        """FLOPs of the matrix product of global matching; matching in cells needs none."""
        return 2 * len(part.destinations) * len(part.sources) * x[:, 0].numel() * (self.matching == "global")
