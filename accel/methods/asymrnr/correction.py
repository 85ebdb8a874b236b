"""Corrects reduced attentions by the error that was last measured. This is ours, not the paper's.

At times an attention runs both full and reduced; the difference of the two outputs is the residual of the reduction.
Until the next such step the residual, or a line through the last two by sigma, is added to the reduced output. So the
reduction has to follow only what has changed since.

Where another method caches the difference of the branches (`Host.exact_steps`), both run full: an error of one branch
alone would be in that difference, grow with the guidance scale and stay until the next one is taken.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from ...core.trace import Step

if TYPE_CHECKING:
    from torch import Tensor

    from ...ops.token_matching import Reduction

    Reductions = tuple[Reduction | None, Reduction | None]  # of queries, of keys and values

Correction = Literal["none", "last", "linear"]
DEPTH = {"none": 0, "last": 1, "linear": 2}  # residuals cached for each attention and branch


@dataclass(frozen=True)
class Residual:
    """Full minus reduced attention output, measured at one step."""

    step: int
    sigma: float
    reductions: Reductions
    tensor: Tensor  # (b, n, d), or (b, n, k, d) if each head has its own plan

    def is_of(self, reductions: Reductions) -> bool:
        """Whether this residual was measured with these reductions."""
        return all(mine is other for mine, other in zip(self.reductions, reductions))


@dataclass
class ResidualCache:
    """The last residuals of one run, by a key that names attention, branch and sample."""

    depth: int  # residuals cached for each key
    interval: int  # steps from one full attention to the next
    entries: dict[tuple, list[Residual]] = field(default_factory=dict)
    last_step: dict[tuple, int] = field(default_factory=dict)  # in which the attention was computed

    def is_fresh(self, key: tuple, step: Step, exact: bool = False) -> bool:
        """Whether the cached residual is still fresh enough; notes that the attention is computed at this step.

        It is not if the attention was last computed an interval ago or more, nor for the unconditional branch at an
        `exact` step, after which another method rebuilds that branch. Residuals that are not fresh are dropped, which
        halves the memory once that branch is rebuilt.
        """
        before, self.last_step[key] = self.last_step.get(key, step.index), step.index
        fresh = step.index - before < self.interval and not (exact and step.branch == "uncond")
        if not fresh:
            self.entries.pop(key, None)
        return fresh

    def needs_refresh(self, key: tuple, step: Step, reductions: Reductions, exact: bool = False) -> bool:
        """Whether the attention must run full: at exact steps, or with an old residual or none of these reductions."""
        entries = self.entries.get(key)
        if exact or not entries or not entries[-1].is_of(reductions):
            return True
        return step.index - entries[-1].step >= self.interval

    def add(self, key: tuple, step: Step, reductions: Reductions, tensor: Tensor) -> None:
        """Cache a residual; those of other reductions are dropped."""
        before = [entry for entry in self.entries.get(key, []) if entry.is_of(reductions)]
        self.entries[key] = [*before, Residual(step.index, step.sigma, reductions, tensor)][-self.depth :]

    def end(self, key: tuple, step: Step, is_guided: bool) -> None:
        """At the last step: drop the residuals of an attention, and those of branches that have ended before."""
        ended = [
            other
            for other in self.entries
            if step.index - self.last_step[other] >= self.interval or (other[1] == "uncond" and not is_guided)
        ]
        for each in (key, *ended):
            self.entries.pop(each, None)

    def extrapolate(self, key: tuple, step: Step) -> Tensor:
        """The residual at a step: the last one, or the line through two by sigma."""
        *before, last = self.entries[key]
        if not before or before[0].sigma == last.sigma:  # a solver may evaluate one noise level twice
            return last.tensor
        return last.tensor.lerp(before[0].tensor, -(step.sigma - last.sigma) / (last.sigma - before[0].sigma))

    @property
    def nbytes(self) -> int:
        """Bytes of all residuals."""
        return sum(entry.tensor.nbytes for entries in self.entries.values() for entry in entries)
