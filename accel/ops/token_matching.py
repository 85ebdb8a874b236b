"""Token reduction on a grid: which tokens may replace which, and reducing a sequence and restoring it.

A `partition` cuts the grid into cells with one random destination each; `match` gives every other token, a source, a
destination and sorts the sources by similarity; `MergePlan.at_rate` turns the order into a `Reduction` at any rate.
Letters: b batch, n tokens, m tokens that stay, s sources, c destinations (one per cell), k heads, d channels per head,
g groups that share a plan: b if heads share one, b * k if each head has its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ..errors import AccelError

Metric = Literal["euclidean", "cosine", "dot"]
MAX_MATCHING_BYTES = 256 * 2**20  # that matching over the whole grid may use at a time


@dataclass(frozen=True)
class Partition:
    """A grid of n tokens in raster order, cut into cells."""

    destinations: Tensor  # (c,) token index, ascending in the cells' raster order
    sources: Tensor  # (s,) token index, ascending
    cell: Tensor  # (s,) the cell of each source, an index into `destinations`

    @property
    def tokens(self) -> int:
        """Number of tokens n."""
        return len(self.destinations) + len(self.sources)

    @property
    def max_rate(self) -> float:
        """The largest share of the tokens that can be removed: all but the destinations."""
        return len(self.sources) / self.tokens


def partition(grid: tuple[int, int, int], cell: tuple[int, int, int], seed: int, device="cpu") -> Partition:
    """Cells of at most `cell` (f, h, w) tokens over the grid (f, h, w), each with one destination drawn by `seed`.

    Cells at the far edges are smaller, so that the last frames, rows and columns have destinations too. The global
    random state is not touched. Raises AccelError if a side of the cell is not positive.
    """
    if min(cell) < 1:
        raise AccelError(f"a cell of {cell} tokens is not possible: each side must be at least 1")
    positions = [torch.arange(n, device="cpu") // step for n, step in zip(grid, cell)]
    counts = [-(-n // step) for n, step in zip(grid, cell)]
    f, h, w = torch.meshgrid(*positions, indexing="ij")
    cell_of = ((f * counts[1] + h) * counts[2] + w).flatten()
    shuffled = _shuffled(len(cell_of), seed)
    by_cell = shuffled[cell_of[shuffled].argsort(stable=True)]  # cells in order, their tokens shuffled
    first = torch.ones_like(cell_of, dtype=torch.bool)
    first[1:] = cell_of[by_cell][1:] != cell_of[by_cell][:-1]
    destinations = by_cell[first]
    is_source = torch.ones_like(cell_of, dtype=torch.bool)
    is_source[destinations] = False
    sources = is_source.nonzero().flatten()
    return Partition(destinations.to(device), sources.to(device), cell_of[sources].to(device))


@dataclass(frozen=True)
class MergePlan:
    """Sources sorted from the most to the least similar to their destination: matched once, reducible at any rate."""

    part: Partition
    order: Tensor  # (g, s) int32: token index of the sources, most similar first
    destination_index: Tensor  # (g, s) int32: index into `part.destinations` of each source's destination
    similarity: Tensor  # (g,) 0: no more than random tokens, 1: equal

    def at_rate(self, rate: float) -> Reduction:
        """The reduction that removes the share `rate` of all tokens. Raises AccelError above `max_rate`."""
        part, (g, _) = self.part, self.order.shape
        if not 0 <= rate <= part.max_rate:
            raise AccelError(f"rate {rate} is not possible: these cells allow 0 to {part.max_rate:.3f}")
        removed = int(part.tokens * rate + 1e-6)
        every = torch.arange(part.tokens, device=self.order.device).expand(g, -1)
        order, replacement = self.order.long(), part.destinations[self.destination_index[:, :removed]]
        keep = torch.cat([order[:, removed:], part.destinations.expand(g, -1)], 1).sort(1).values
        rank = torch.zeros_like(every).scatter(1, keep, every[:, : keep.shape[1]])
        restore_index = rank.gather(1, every.scatter(1, order[:, :removed], replacement))
        sizes = torch.zeros_like(keep).scatter_add(1, restore_index, torch.ones_like(restore_index))
        offset = part.tokens * torch.arange(g, device=keep.device)[:, None]  # of each group's first token, among all
        members = (restore_index.argsort(dim=1, stable=True) + offset).flatten()
        return Reduction(*(index.int() for index in (keep, restore_index, sizes, members)))


@dataclass(frozen=True)
class Reduction:
    """Which tokens stay, and which of these replaces each token: int32. Reducing and restoring are one gather each."""

    keep: Tensor  # (g, m) token index, ascending
    restore_index: Tensor  # (g, n) position in `keep` of the token that replaces each token
    sizes: Tensor  # (g, m) how many tokens each of these replaces, itself included
    members: Tensor  # (g n,) among the tokens of all groups: those that the first of `keep` replaces, the second, ...

    @property
    def nbytes(self) -> int:
        """Bytes of all indices."""
        return sum(tensor.nbytes for tensor in vars(self).values())

    def bias(self, batch: int, heads: int) -> Tensor:
        """`size_bias` in the shape of logits: (b, 1, 1, m), or (b, k, 1, m) with a plan for each head."""
        return size_bias(self.sizes).view(batch, heads if len(self.keep) > batch else 1, 1, -1)

    def reduce(self, x: Tensor, mean: bool = False) -> Tensor:
        """x (b, n, k, d) reduced to (b, m, k, d): the tokens that stay, or (`mean`) the mean of those they replace."""
        features = _features(x, len(self.keep))
        if not mean:
            return _tokens(_take(features, self.keep), x.shape)
        return _tokens(self._mean(features), x.shape)

    def _mean(self, features: Tensor) -> Tensor:
        """Means (g, m, width) of features (g, n, width), summed in float32 and always in the same order."""
        ends = self.sizes.flatten().cumsum(0, dtype=torch.int32)
        means = F.embedding_bag(self.members, features.flatten(0, 1), ends - self.sizes.flatten(), mode="mean")
        return means.unflatten(0, (len(features), -1))

    def restore(self, x: Tensor) -> Tensor:
        """x (b, m, k, d) at full length (b, n, k, d): each token gets the row of the token that replaces it."""
        return _tokens(_take(_features(x, len(self.restore_index)), self.restore_index), x.shape)


def match(
    x: Tensor, part: Partition, metric: Metric = "euclidean", global_search: bool = False, shared: bool = True,
    memory: int = MAX_MATCHING_BYTES,
) -> MergePlan:  # fmt: skip
    """The plan for features x (b, n, k, d), centred on their mean.

    A source's destination is that of its own cell (linear cost), or with `global_search` the nearest of all, by a
    matrix product that is computed in chunks of about `memory` bytes. `shared`: one plan for all heads.
    """
    features = _features(x, len(x) if shared else len(x) * x.shape[2])
    g, _, width = features.shape
    centre = features.mean(1, keepdim=True, dtype=torch.float32)

    def centred(y: Tensor) -> Tensor:
        return F.normalize(y - centre, dim=-1) if metric == "cosine" else y - centre

    def match_chunk(index: Tensor, cell: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        sources, destination_index = centred(features.index_select(1, index)), cell.expand(g, -1)
        if global_search:
            destination_index = _nearest(sources, features, part.destinations.split(columns), centred, metric)
        destinations = centred(_take(features, part.destinations[destination_index]))
        dissimilarity = None if metric == "euclidean" else (destinations * sources).sum(-1).neg_()
        squared = destinations.sub_(sources).square_().sum(-1)
        distance = squared if dissimilarity is None else dissimilarity
        return distance, destination_index, sources.square_().sum((1, 2)), squared.sum(1)

    columns = max(1, memory // (32 * g * width))  # destinations at a time: a quarter of the memory
    rows = max(1, 3 * memory // (16 * g * (5 * width + 2 * columns * global_search)))
    chunks = [match_chunk(*chunk) for chunk in zip(part.sources.split(rows), part.cell.split(rows))]
    distance, destination_index = (torch.cat([chunk[i] for chunk in chunks], 1) for i in (0, 1))
    spread, squared = (torch.stack([chunk[i] for chunk in chunks]).sum(0) for i in (2, 3))
    order = distance.argsort(dim=1, stable=True)
    similarity = (1 - squared / (2 * spread).clamp_min(1e-12)).clamp(0, 1)  # two random sources differ by 2 x spread
    return MergePlan(part, part.sources[order].int(), destination_index.gather(1, order).int(), similarity)


def _shuffled(n: int, seed: int) -> Tensor:
    """0 to n - 1 in a random order, on the CPU whatever torch's default device is: the same for every device."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed), device="cpu")


def grid_plan(part: Partition, groups: int) -> MergePlan:
    """The plan without matching: sources go to their own cells, in one random order so that no frame goes first."""
    shuffled = _shuffled(len(part.sources), 0).to(part.sources.device)
    order, cell = part.sources[shuffled].expand(groups, -1), part.cell[shuffled].expand(groups, -1)
    return MergePlan(part, order.int(), cell.int(), torch.ones(groups, device=order.device))


def _nearest(
    sources: Tensor, features: Tensor, chunks: tuple[Tensor, ...], centred: Callable, metric: Metric
) -> Tensor:
    """Index (g, s) of the destination, of all in the chunks, that is nearest to each source (g, s, width)."""
    best, index, before = None, None, 0
    for chunk in chunks:
        targets = centred(features.index_select(1, chunk))
        far = (sources @ targets.mT).neg_()
        if metric == "euclidean":
            far.mul_(2).add_(targets.square().sum(-1)[:, None])
        near, which = far.min(-1)
        if before:
            closer = near < best
            near, which = torch.where(closer, near, best), torch.where(closer, which + before, index)
        best, index, before = near, which, before + len(chunk)
    return index


def _features(x: Tensor, g: int) -> Tensor:
    """x (b, n, k, d) as (g, n, width): all heads together if they share a plan, else one group per head."""
    return x.flatten(2) if g == len(x) else rearrange(x, "b n k d -> (b k) n d")


def _tokens(features: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of `_features` for x of `shape` but any length."""
    b, _, k, d = shape
    return features.unflatten(2, (k, d)) if len(features) == b else rearrange(features, "(b k) n d -> b n k d", b=b)


def _take(features: Tensor, index: Tensor) -> Tensor:
    """features (g, n, width) at index (g, m): (g, m, width), as one selection of contiguous rows."""
    g, n, width = features.shape
    if g == 1:
        return features[0].index_select(0, index[0])[None]
    flat = index + n * torch.arange(g, device=index.device)[:, None]
    return features.reshape(g * n, width).index_select(0, flat.flatten()).view(g, -1, width)


def size_bias(sizes: Tensor) -> Tensor:
    """The log of the sizes (g, m): added to a key's logits, the key weighs as much as the tokens it replaces."""
    return sizes.float().log()
