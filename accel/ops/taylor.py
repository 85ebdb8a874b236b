"""A Taylor series through the last few values of a feature: TaylorSeer (arXiv 2503.06923)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
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

    def refresh(self, position: float, feature: Tensor, order: int, newest: float = 1.0) -> None:
        """Cache a computed feature and its differences, up to `order`, from those computed before.

        `newest`: the weight of the newest first difference; what is left is that of the one before, so that errors that
        alternate cancel out.
        """
        is_usable = self.fits(feature) and position != self.position  # a solver may evaluate twice at one sigma
        terms = [feature]
        for older in self.terms[:order] if is_usable else []:
            terms.append((terms[-1] - older) / (position - self.position))
        if newest < 1 and min(len(terms), len(self.terms)) > 1:
            terms[1] = self.terms[1].lerp(terms[1], newest)
        self.position, self.terms = position, terms

    def extrapolate(self, position: float, share: float | Tensor = 1.0) -> Tensor:
        """The Taylor series at a later position, or after a share of the way to it: one, or each sample's (b, 1, 1)."""
        ahead = share * (position - self.position)
        if isinstance(ahead, Tensor):
            ahead = ahead.to(self.terms[0].dtype)
        return sum(term * (ahead**i / math.factorial(i)) for i, term in enumerate(self.terms))

    def best_share(self, position: float, feature: Tensor) -> Tensor | None:
        """The share (b, 1, 1) of the way to a position that comes closest to the feature there, by least squares.

        It is each sample's own, measured on at most 4,096 of its tokens. None without a difference.
        """
        if len(self.terms) < 2 or not self.fits(feature) or position == self.position:
            return None
        some = slice(None, None, 1 + feature.shape[1] // 4096)
        trend = (self.terms[1][:, some] * (position - self.position)).float()
        change = (feature[:, some] - self.terms[0][:, some]).float()
        total = lambda x: x.sum(tuple(range(1, x.ndim)), keepdim=True)
        return total(trend * change) / total(trend.square()).clamp(min=torch.finfo(trend.dtype).tiny)
