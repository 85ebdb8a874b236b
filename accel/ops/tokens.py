"""Token reduction on a grid: which tokens may stand for which, and shortening a sequence and restoring it.

A `partition` cuts the grid into cells with one random destination each; `match` gives every other token, a source,
its destination and ranks the sources by likeness; `cut` turns the ranking into a `Reduction` at any rate.
Letters: b batch, n tokens, m kept tokens, s sources, c destinations (one a cell), h heads, d channels a head,
g groups that share a plan: b with shared heads, b * h with separate ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

Metric = Literal["euclidean", "cosine", "dot"]
MAX_MATCHING_BYTES = 256 * 2**20  # bytes that global matching may use at a time


@dataclass(frozen=True)
class Partition:
    """A grid of n tokens in raster order, cut into cells."""

    destinations: Tensor  # (c,) token index, ascending in the cells' raster order
    sources: Tensor  # (s,) token index, ascending
    cell: Tensor  # (s,) the cell of each source, an index into `destinations`

    @property
    def tokens(self) -> int:
        """How many there are in all."""
        return len(self.destinations) + len(self.sources)

    @property
    def max_rate(self) -> float:
        """The share of the tokens that can be removed: all but the destinations."""
        return len(self.sources) / self.tokens


def partition(grid: tuple[int, int, int], cell: tuple[int, int, int], seed: int, device="cpu") -> Partition:
    """Cells of at most `cell` (f, h, w) tokens over the grid (f, h, w), each with one destination drawn by `seed`.

    Cells at the far edges are cut short, never left out, so that the last frames, rows and columns have destinations
    too. The global random state is not touched. Raises ValueError if a cell is not positive.
    """
    if min(cell) < 1:
        raise ValueError(f"a cell of {cell} tokens is not possible: each side must be at least 1")
    places = [torch.arange(n) // step for n, step in zip(grid, cell)]
    counts = [-(-n // step) for n, step in zip(grid, cell)]
    f, h, w = torch.meshgrid(*places, indexing="ij")
    owner = ((f * counts[1] + h) * counts[2] + w).flatten()
    shuffled = torch.randperm(len(owner), generator=torch.Generator().manual_seed(seed))
    by_cell = shuffled[owner[shuffled].argsort(stable=True)]  # cells in order, their tokens shuffled
    first = torch.ones(len(owner), dtype=torch.bool)
    first[1:] = owner[by_cell][1:] != owner[by_cell][:-1]
    destinations = by_cell[first]
    rest = torch.ones(len(owner), dtype=torch.bool)
    rest[destinations] = False
    sources = rest.nonzero().flatten()
    return Partition(destinations.to(device), sources.to(device), owner[sources].to(device))


@dataclass(frozen=True)
class MergePlan:
    """Sources from the most to the least alike their destination, found once; any rate is a cut of it."""

    part: Partition
    order: Tensor  # (g, s) int32: token index of the sources, most alike first
    owner: Tensor  # (g, s) int32: index into `part.destinations` of the destination of each of them
    similarity: Tensor  # (g,) 0: as unlike as random tokens, 1: the same

    def cut(self, rate: float) -> Reduction:
        """The reduction that removes the share `rate` of all tokens. Raises ValueError beyond the partition."""
        part, (g, _) = self.part, self.order.shape
        if not 0 <= rate <= part.max_rate:
            raise ValueError(f"rate {rate} is not possible: these cells allow 0 to {part.max_rate:.3f}")
        removed = int(part.tokens * rate + 1e-6)
        every = torch.arange(part.tokens, device=self.order.device).expand(g, -1)
        order, heir = self.order.long(), part.destinations[self.owner[:, :removed]]
        keep = torch.cat([order[:, removed:], part.destinations.expand(g, -1)], 1).sort(1).values
        rank = torch.zeros_like(every).scatter(1, keep, every[:, : keep.shape[1]])
        place = rank.gather(1, every.scatter(1, order[:, :removed], heir))
        sizes = torch.zeros_like(keep).scatter_add(1, place, torch.ones_like(place))
        row = part.tokens * torch.arange(g, device=keep.device)[:, None]  # of each group's first token, among all
        members = (place.argsort(dim=1, stable=True) + row).flatten()
        return Reduction(*(index.int() for index in (keep, place, sizes, members)))


@dataclass(frozen=True)
class Reduction:
    """Which tokens stay, and who stands for each token: int32. Shortening and restoring are one gather of rows each."""

    keep: Tensor  # (g, m) token index, ascending
    place: Tensor  # (g, n) position in `keep` of the token that stands for each token
    sizes: Tensor  # (g, m) how many tokens each kept one stands for
    members: Tensor  # (g n,) among the tokens of all groups: those that the first kept one stands for, the second, ...

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(tensor.nbytes for tensor in vars(self).values())

    def bias(self, batch: int, heads: int) -> Tensor:
        """`size_bias` in the shape of logits: (b, 1, 1, m), or (b, h, 1, m) with a plan for each head."""
        return size_bias(self.sizes).view(batch, heads if len(self.keep) > batch else 1, 1, -1)

    def reduce(self, x: Tensor, mean: bool = False) -> Tensor:
        """x (b, n, h, d) shortened to (b, m, h, d): kept tokens as they are, or the mean of those they stand for."""
        rows = _features(x, len(self.keep))
        if not mean:
            return _tokens(_take(rows, self.keep), x.shape)
        return _tokens(self._mean(rows), x.shape)

    def _mean(self, rows: Tensor) -> Tensor:
        """Means (g, m, k) of rows (g, n, k), summed in float32 and always in the same order."""
        ends = self.sizes.flatten().cumsum(0, dtype=torch.int32)
        means = F.embedding_bag(self.members, rows.flatten(0, 1), ends - self.sizes.flatten(), mode="mean")
        return means.unflatten(0, (len(rows), -1))

    def restore(self, x: Tensor) -> Tensor:
        """x (b, m, h, d) at full length (b, n, h, d): each token gets the row of the one that stands for it."""
        return _tokens(_take(_features(x, len(self.place)), self.place), x.shape)


def match(
    x: Tensor, part: Partition, metric: Metric = "euclidean", global_search: bool = False, shared: bool = True,
    memory: int = MAX_MATCHING_BYTES,
) -> MergePlan:  # fmt: skip
    """The plan for features x (b, n, h, d), centred on their mean.

    A source's destination is that of its own cell (linear cost), or the best of all (`everywhere`: a matrix product
    never whole). About `memory` bytes are used at a time. `shared`: one plan for all heads.
    """
    rows = _features(x, len(x) if shared else len(x) * x.shape[2])
    g, _, width = rows.shape
    middle = rows.mean(1, keepdim=True, dtype=torch.float32)

    def ready(y: Tensor) -> Tensor:
        return F.normalize(y - middle, dim=-1) if metric == "cosine" else y - middle

    def piece(place: Tensor, cell: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        sources, owner = ready(rows.index_select(1, place)), cell.expand(g, -1)
        if global_search:
            owner = _nearest(sources, rows, part.destinations.split(columns), ready, metric)
        own = ready(_take(rows, part.destinations[owner]))
        unlike = None if metric == "euclidean" else (own * sources).sum(-1).neg_()
        apart = own.sub_(sources).square_().sum(-1)
        return apart if unlike is None else unlike, owner, sources.square_().sum((1, 2)), apart.sum(1)

    columns = max(1, memory // (32 * g * width))  # destinations at a time: a quarter of the memory
    lines = max(1, 3 * memory // (16 * g * (5 * width + 2 * columns * global_search)))
    pieces = [piece(*chunk) for chunk in zip(part.sources.split(lines), part.cell.split(lines))]
    distance, owner = (torch.cat([p[i] for p in pieces], 1) for i in (0, 1))
    spread, apart = (torch.stack([p[i] for p in pieces]).sum(0) for i in (2, 3))
    order = distance.argsort(dim=1, stable=True)
    similarity = (1 - apart / (2 * spread).clamp_min(1e-12)).clamp(0, 1)  # two random sources are 2 x spread apart
    return MergePlan(part, part.sources[order].int(), owner.gather(1, order).int(), similarity)


def grid_plan(part: Partition, groups: int) -> MergePlan:
    """The plan without matching: sources go to their own cells, in an order drawn once: not the first frames first."""
    shuffled = torch.randperm(len(part.sources), generator=torch.Generator().manual_seed(0)).to(part.sources.device)
    order, owner = part.sources[shuffled].expand(groups, -1), part.cell[shuffled].expand(groups, -1)
    return MergePlan(part, order.int(), owner.int(), torch.ones(groups, device=order.device))


def _nearest(sources: Tensor, rows: Tensor, chunks: tuple[Tensor, ...], ready: Callable, metric: Metric) -> Tensor:
    """Which destination (g, s), of all in the chunks, is nearest to each source (g, s, k)."""
    best, owner, before = None, None, 0
    for chunk in chunks:
        targets = ready(rows.index_select(1, chunk))
        far = (sources @ targets.mT).neg_()
        if metric == "euclidean":
            far.mul_(2).add_(targets.square().sum(-1)[:, None])
        near, which = far.min(-1)
        if before:
            closer = near < best
            near, which = torch.where(closer, near, best), torch.where(closer, which + before, owner)
        best, owner, before = near, which, before + len(chunk)
    return owner


def _features(x: Tensor, g: int) -> Tensor:
    """x (b, n, h, d) as (g, n, h d / ...): heads side by side if they share a plan, else each a group."""
    return x.flatten(2) if g == len(x) else rearrange(x, "b n h d -> (b h) n d")


def _tokens(rows: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of `_rows` for x of `shape` but any length."""
    b, _, h, d = shape
    return rows.unflatten(2, (h, d)) if len(rows) == b else rearrange(rows, "(b h) n d -> b n h d", b=b)


def _take(rows: Tensor, index: Tensor) -> Tensor:
    """rows (g, n, k) at index (g, m): (g, m, k), as one selection of contiguous rows."""
    g, n, k = rows.shape
    if g == 1:
        return rows[0].index_select(0, index[0])[None]
    flat = index + n * torch.arange(g, device=index.device)[:, None]
    return rows.reshape(g * n, k).index_select(0, flat.flatten()).view(g, -1, k)


def size_bias(sizes: Tensor) -> Tensor:
    """The log of the sizes (g, m). Added to a key's logits, it weighs as much as the tokens it stands for."""
    return sizes.float().log()
