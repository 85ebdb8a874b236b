"""A Taylor series through the last few values of a feature: TaylorSeer (arXiv 2503.06923)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class TaylorCache:
    """A feature (b, n, d) where it was last computed, with its backward differences.

    A position is any number that only rises or only falls in a run: a step's index, or its log signal-to-noise ratio.
    """

    position: float = 0
    terms: list[Tensor] = field(default_factory=list)  # differences of order 0, 1, ...

    @property
    def nbytes(self) -> int:
        """Bytes of all cached tensors."""
        return sum(term.nbytes for term in self.terms)

    def fits(self, x: Tensor) -> bool:
        """Whether a feature of the shape of x is cached."""
        return bool(self.terms) and self.terms[0].shape == x.shape

    def refresh(self, position: float, feature: Tensor, order: int) -> None:
        """Cache a computed feature and its differences, up to `order`, from those computed before."""
        is_usable = self.fits(feature) and position != self.position  # a solver may evaluate twice at one sigma
        terms = [feature]
        for older in self.terms[:order] if is_usable else []:
            terms.append((terms[-1] - older) / (position - self.position))
        self.position, self.terms = position, terms

    def extrapolate(self, position: float) -> Tensor:
        """The Taylor series at a later position."""
        ahead = position - self.position
        return sum(term * (ahead**i / math.factorial(i)) for i, term in enumerate(self.terms))
