"""What a reduced attention misses, carried from step to step.

Now and then an attention runs whole and reduced; what lies between the two outputs is what the reduction missed there.
Until it does so again, that difference, or the line through the last two of them by noise level, is added to what the
reduced attention gives, which then has to follow only what has changed since. This is ours, not the paper's.

Where another method takes the branches' difference and holds it (`Host.anchors`), both run whole: an error of one
branch alone would be in that difference, grow with the guidance and stay until the next is taken.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from ...core.trace import Step
from ...ops.tokens import Reduction

Correction = Literal["none", "last", "linear"]
DEPTH = {"none": 0, "last": 1, "linear": 2}  # differences held for each attention and branch
Cuts = tuple[Reduction | None, Reduction | None]  # of queries, of keys and values


@dataclass(frozen=True)
class Missed:
    """What a pair of cuts missed in one step."""

    step: int
    sigma: float
    cuts: Cuts
    tensor: Tensor  # (b, n, d) or (b, n, h, d): where the family restores

    def of(self, cuts: Cuts) -> bool:
        """Whether it is these cuts that missed it."""
        return all(mine is other for mine, other in zip(self.cuts, cuts))


@dataclass
class ResidualCache:
    """The last differences of one run, by whatever key tells attentions and branches apart."""

    depth: int
    interval: int  # steps from one whole attention to the next
    found: dict[tuple, list[Missed]] = field(default_factory=dict)
    called: dict[tuple, int] = field(default_factory=dict)  # step of the last call

    def serves(self, key: tuple, step: Step, anchor: bool = False) -> bool:
        """Whether the calls of an attention are near enough that what one misses serves the next.

        In an `anchor` step, from which the unconditional branch is rebuilt until the next one, that branch's are not.
        What was missed in one that is not served is forgotten: half of all memory, once that branch is rebuilt.
        """
        before, self.called[key] = self.called.get(key, step.index), step.index
        near = step.index - before < self.interval and not (anchor and step.branch == "uncond")
        if not near:
            self.found.pop(key, None)
        return near

    def due(self, key: tuple, step: Step, cuts: Cuts, anchor: bool = False) -> bool:
        """Whether the attention has to run whole: for an anchor, or as nothing is known of these cuts, or it is old."""
        found = self.found.get(key)
        return anchor or not found or not found[-1].of(cuts) or step.index - found[-1].step >= self.interval

    def add(self, key: tuple, step: Step, cuts: Cuts, tensor: Tensor) -> None:
        """Hold what was missed; what other cuts missed is forgotten."""
        before = [missed for missed in self.found.get(key, []) if missed.of(cuts)]
        self.found[key] = [*before, Missed(step.index, step.sigma, cuts, tensor)][-self.depth :]

    def now(self, key: tuple, step: Step) -> Tensor:
        """What is missed at a step: the last difference, or the line through two."""
        *before, last = self.found[key]
        if not before:
            return last.tensor
        return last.tensor.lerp(before[0].tensor, -(step.sigma - last.sigma) / (last.sigma - before[0].sigma))

    @property
    def held(self) -> int:
        """Bytes of all differences."""
        return sum(missed.tensor.nbytes for found in self.found.values() for missed in found)
