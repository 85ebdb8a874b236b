"""Queries, keys and values that are projected only when a method asks for them, and only for the tokens that stay.

Normalisation and rotary embedding act on each token alone, and values and outputs are linear in the tokens. So
reducing before the projection gives the same result as reducing after it, and the projections of removed tokens are
never computed. This holds while all heads share one plan and nothing (such as matching) needs the full tensor.

A family supplies its `Projections`; nothing here knows a model.
Letters: b batch, n tokens, m tokens that stay, k attention heads, d channels per head (of hidden states: the width).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from ..ops.token_matching import Reduction
from .attention import QKV


@dataclass(frozen=True)
class Projections:
    """The parts of a family's self-attention that lie around its softmax."""

    heads: int
    head_dim: int
    query: nn.Module  # linear layers (b, n, d) -> (b, n, k d)
    key: nn.Module
    value: nn.Module
    norm_query: Callable[[Tensor], Tensor]  # on (b, n, k d)
    norm_key: Callable[[Tensor], Tensor]
    output: Callable[[Tensor], Tensor]  # (b, n, k d) -> (b, n, d)
    fused: nn.Module | None  # one layer for all three, where the user has fused them
    rope: tuple[Tensor, ...] | None  # tables (1, n, 1, d) of the rotary embedding
    rotate: Callable[[Tensor, tuple[Tensor, ...]], Tensor]  # all tokens (b, n, k, d) by the tables
    rotate_rows: Callable[[Tensor, tuple[Tensor, ...]], Tensor]  # some tokens by their rows (b, m, 1, d)


class LazyQKV(QKV):
    """`QKV` over hidden states x (b, n, d), projected on demand."""

    def __init__(self, x: Tensor, projections: Projections):
        super().__init__(None, None, None)
        self.x, self.projections = x, projections
        self.pending_restore: tuple[Reduction | None, Tensor | None] = (None, None)  # reduction and residual
        self.full_output: tuple[Tensor | None, Tensor | None] = (None, None)  # a core's output and its projection
        self.reduced_hidden: dict[tuple[int, bool], Tensor] = {}  # by reduction, shared by query, key and value
        if projections.fused is not None:
            q, k, v = projections.fused(x).chunk(3, -1)
            self.q, self.k = self._rotated(projections.norm_query(q)), self._rotated(projections.norm_key(k))
            self.v = self._split(v)

    @property
    def shape(self) -> tuple[int, ...]:
        """(b, n, k, d) of all tokens."""
        return (*self.x.shape[:2], self.projections.heads, self.projections.head_dim)

    def query(self, reduction: Reduction | None = None, mean: bool = False) -> Tensor:
        p = self.projections
        self.q, result = self._norm_and_rope(self.q, p.query, p.norm_query, reduction, mean)
        return result

    def key(self, reduction: Reduction | None = None, mean: bool = False) -> Tensor:
        p = self.projections
        self.k, result = self._norm_and_rope(self.k, p.key, p.norm_key, reduction, mean)
        return result

    def value(self, reduction: Reduction | None = None, mean: bool = False) -> Tensor:
        if self.v is None and self._can_reduce_first(reduction):
            return self._split(self._project_reduced(self.projections.value, reduction, mean))
        if self.v is None:
            self.v = self._split(self.projections.value(self.x))
        return self.reduce(self.v, reduction, mean)

    def restore(self, y: Tensor, reduction: Reduction | None, residual: Tensor | None = None) -> Tensor:
        if not self._defers_restore(reduction):
            return super().restore(y, reduction, residual)
        self.pending_restore = reduction, residual
        if reduction is not None:
            self._count_saved(reduction)
        return y

    def residual(self, full: Tensor, reduced: Tensor, reduction: Reduction | None) -> Tensor:
        if not self._defers_restore(reduction):
            return super().residual(full, reduced, reduction)
        self.full_output = full, self._project(full)
        self.saved_flops -= 2 * reduced[:, :, 0, 0].numel() * self.x.shape[2] ** 2
        return self.full_output[1] - self._restore_projected(self._project(reduced), reduction)

    def project_out(self, y: Tensor) -> Tensor:
        """The attention's output (b, n, d) for its core's output y (b, n or m, k, d)."""
        out = self.full_output[1] if y is self.full_output[0] else self._project(y)
        reduction, residual = self.pending_restore
        if reduction is None and residual is None:
            return out
        return self._restore_projected(out, reduction, residual)

    def _project(self, y: Tensor) -> Tensor:
        return self.projections.output(y.flatten(2, 3).type_as(self.x))

    def _restore_projected(self, y: Tensor, reduction: Reduction | None, residual: Tensor | None = None) -> Tensor:
        """`QKV.restore` of a projected output (b, m, d)."""
        return super().restore(y[:, :, None], reduction, None if residual is None else residual[:, :, None]).squeeze(2)

    def _defers_restore(self, reduction: Reduction | None) -> bool:
        """Whether restoring may wait until after the output projection."""
        return reduction is None or self._can_reduce_first(reduction)

    def _can_reduce_first(self, reduction: Reduction | None) -> bool:
        """Whether hidden states can be reduced before they are projected: only where all heads share the plan."""
        return reduction is not None and len(reduction.keep) == len(self.x)

    def _norm_and_rope(
        self, full: Tensor | None, layer: nn.Module, norm: Callable, reduction: Reduction | None, mean: bool
    ) -> tuple[Tensor | None, Tensor]:
        """The tensor of all tokens (None if only kept tokens were projected) and the requested one; means need all."""
        if full is None and self._can_reduce_first(reduction) and not mean:
            return None, self._rotated(norm(self._project_reduced(layer, reduction)), reduction)
        if full is None:
            full = self._rotated(norm(layer(self.x)))
        return full, self.reduce(full, reduction, mean)

    def _project_reduced(self, layer: nn.Module, reduction: Reduction, mean: bool = False) -> Tensor:
        """The projection (b, m, k d) of the tokens that stay."""
        self._count_saved(reduction)
        key = id(reduction), mean
        if key not in self.reduced_hidden:
            self.reduced_hidden[key] = self.reduce(self.x[:, :, None], reduction, mean).squeeze(2)
        return layer(self.reduced_hidden[key])

    def _count_saved(self, reduction: Reduction) -> None:
        b, n, d = self.x.shape
        self.saved_flops += 2 * b * (n - reduction.keep.shape[1]) * d**2

    def _split(self, y: Tensor) -> Tensor:
        return y.unflatten(2, self.shape[2:])

    def _rotated(self, y: Tensor, reduction: Reduction | None = None) -> Tensor:
        """Heads (b, m, k, d) of y (b, m, k d) after rotary embedding, each token by its own position."""
        p = self.projections
        if reduction is None:
            return p.rotate(self._split(y), p.rope)
        with self.timer:
            rows = tuple(table[0][reduction.keep] for table in p.rope)
        return p.rotate_rows(self._split(y), rows)
