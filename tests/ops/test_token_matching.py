"""Partition, matching, reduction and restoration on grids that can be checked by hand."""

import weakref
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from accel.core.attention import fold_bias_into_channels
from accel.families.wan import Wan
from accel.methods import AsymRnR
from accel.methods.base import RunSpec
from accel.ops.token_matching import grid_plan, match, partition, size_bias

GRID = (3, 5, 4)  # no side but the last is a multiple of the cells below


def features(n=60, heads=2, seed=0, b=1):
    return torch.randn(b, n, heads, 4, generator=torch.Generator().manual_seed(seed))


def test_a_partition_does_not_depend_on_torchs_default_device():
    expected = partition(GRID, (2, 2, 2), seed=1)
    with torch.device("meta"):
        found = partition(GRID, (2, 2, 2), seed=1)
        plan = grid_plan(found, 1)
    assert torch.equal(found.destinations, expected.destinations) and torch.equal(found.cell, expected.cell)
    assert torch.equal(plan.order, grid_plan(expected, 1).order)


def test_large_grids_have_exactly_one_destination_per_cell():
    """6,440 cells: sorting by cell number plus a float32 fraction would push tokens into the next cell."""
    part = partition((21, 45, 80), (3, 2, 2), seed=1)
    assert len(part.destinations) == 7 * 23 * 40
    cells_of = torch.stack(torch.unravel_index(part.destinations, (21, 45, 80)), 1) // torch.tensor((3, 2, 2))
    assert torch.equal((cells_of[:, 0] * 23 + cells_of[:, 1]) * 40 + cells_of[:, 2], torch.arange(6440))


@pytest.mark.parametrize("memory", [3000, 20_000, 2**28])
def test_a_memory_limit_changes_the_chunks_and_not_the_plan(memory):
    x, part = features(), partition(GRID, (2, 2, 2), seed=0)
    unlimited, limited = (match(x, part, global_search=True, memory=m) for m in (2**28, memory))
    assert torch.equal(unlimited.order, limited.order)
    assert torch.equal(unlimited.destination_index, limited.destination_index)


def test_a_grid_plan_removes_tokens_from_all_frames():
    part = partition((4, 4, 4), (1, 2, 2), seed=0)
    reduction = grid_plan(part, 1).at_rate(0.4)
    gone = 16 - (reduction.keep[0] // 16).bincount(minlength=4)
    assert gone.min() > 2


@pytest.mark.parametrize("cell", [(2, 2, 2), (1, 2, 2), (3, 3, 3), (1, 1, 1)])
def test_every_cell_has_one_destination_also_at_the_far_edges(cell):
    part = partition(GRID, cell, seed=0)
    cells_of = torch.stack(torch.unravel_index(part.destinations, GRID), 1) // torch.tensor(cell)
    cells = [-(-n // c) for n, c in zip(GRID, cell)]
    assert len({tuple(p.tolist()) for p in cells_of}) == len(part.destinations) == cells[0] * cells[1] * cells[2]
    both = torch.cat([part.destinations, part.sources]).sort().values
    assert torch.equal(both, torch.arange(60))
    own = torch.stack(torch.unravel_index(part.sources, GRID), 1) // torch.tensor(cell)
    assert torch.equal(own, cells_of[part.cell])


def test_a_seed_fixes_the_partition_and_global_random_state_is_untouched():
    before = torch.get_rng_state()
    one, two, other = (partition(GRID, (2, 2, 2), seed) for seed in (1, 1, 2))
    assert torch.equal(one.destinations, two.destinations) and not torch.equal(one.destinations, other.destinations)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_row_of_four_tokens_by_hand():
    """Two cells of two: the most similar pair merges first, its mean replaces both, and restoring copies it back."""
    part = partition((1, 1, 4), (1, 1, 2), seed=0)
    x = torch.tensor([0.0, 5.0, 1.0, 1.5]).view(1, 4, 1, 1)
    plan = match(x, part)
    reduction = plan.at_rate(0.25)
    stays = part.destinations[1].item()
    assert plan.order[0].tolist() == [*({2, 3} - {stays}), *({0, 1} - {part.destinations[0].item()})]
    assert reduction.keep[0].tolist() == [0, 1, stays] and reduction.restore_index[0].tolist() == [0, 1, 2, 2]
    assert reduction.sizes[0].tolist() == [1, 1, 2]
    assert reduction.reduce(x, mean=True).flatten().tolist() == [0.0, 5.0, 1.25]
    assert reduction.restore(reduction.reduce(x)).flatten().tolist() == [
        0.0,
        5.0,
        x[0, stays].item(),
        x[0, stays].item(),
    ]


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("global_search", [True, False])
@pytest.mark.parametrize("metric", ["euclidean", "cosine", "dot"])
def test_restoring_a_reduction_leaves_the_tokens_that_stay_as_they_were(metric, global_search, shared):
    x = features(b=2)
    reduction = match(x, partition(GRID, (2, 2, 2), 0), metric, global_search, shared).at_rate(0.5)
    again = reduction.restore(reduction.reduce(x))
    assert again.shape == x.shape and reduction.reduce(x).shape == (2, 30, 2, 4)
    for g, keep in enumerate(reduction.keep):
        b, heads = (g, slice(None)) if shared else divmod(g, 2)
        assert torch.equal(again[b, keep][:, heads], x[b, keep][:, heads])


def test_global_search_finds_the_nearest_destination_and_chunks_change_nothing():
    x, part = features(), partition(GRID, (2, 2, 2), 0)
    plan, chunked = (match(x, part, global_search=True, memory=m) for m in (2**28, 500))
    flat = x.flatten(2)[0]
    far = torch.cdist(flat[plan.order[0]], flat[part.destinations])
    assert torch.equal(plan.destination_index[0], far.argmin(1))
    assert torch.equal(chunked.order, plan.order) and torch.equal(chunked.destination_index, plan.destination_index)
    assert (far.min(1).values.diff() >= -1e-5).all()


def test_matching_by_cell_stays_in_the_cell():
    part = partition(GRID, (2, 2, 2), 0)
    plan = match(features(), part)
    cell_of = dict(zip(part.sources.tolist(), part.cell.tolist()))
    assert [cell_of[s] for s in plan.order[0].tolist()] == plan.destination_index[0].tolist()


def test_a_higher_rate_removes_more_tokens_in_the_same_order():
    plan = match(features(), partition(GRID, (2, 2, 2), 0))
    stay = [set(plan.at_rate(rate).keep[0].tolist()) for rate in (0.0, 0.1, 0.3, 0.6)]
    assert [len(k) for k in stay] == [60, 54, 42, 24] and stay[3] < stay[2] < stay[1] < stay[0]
    assert torch.equal(plan.at_rate(0.0).reduce(features()), features())


def test_a_rate_above_the_partitions_maximum_names_the_maximum():
    plan = match(features(), partition(GRID, (2, 2, 2), 0))
    with pytest.raises(ValueError, match="rate 0.9 is not possible: these cells allow 0 to 0.800"):
        plan.at_rate(0.9)


def test_size_bias_equals_repeated_keys():
    """Attention over merged keys with the bias equals attention over the keys repeated as often as their sizes."""
    plan = match(features(), partition(GRID, (2, 2, 2), 0))
    reduction, q = plan.at_rate(0.5), features(seed=1).transpose(1, 2)
    reduced = [reduction.reduce(features(seed=s), mean=True) for s in (2, 3)]
    repeated = [reduction.restore(t).transpose(1, 2) for t in reduced]
    attend = torch.nn.functional.scaled_dot_product_attention
    k, v = (t.transpose(1, 2) for t in reduced)
    biased = attend(q, k, v, attn_mask=size_bias(reduction.sizes)[:, None, None])
    torch.testing.assert_close(biased, attend(q, *repeated))


def test_similarity_is_one_for_copies_and_near_zero_for_noise():
    part = partition((1, 8, 8), (1, 2, 2), 0)
    same = torch.randn(1, 1, 4, 1, 4, 1, 2, 8).expand(1, 1, 4, 2, 4, 2, 2, 8).reshape(1, 64, 2, 8)
    assert match(same, part).similarity.item() == pytest.approx(1.0)
    assert match(torch.randn(1, 64, 2, 8, generator=torch.Generator().manual_seed(0)), part).similarity.item() < 0.2


class Peak(TorchDispatchMode):
    """Peak bytes of tensors created inside; on the meta device nothing is allocated."""

    def __init__(self, *inputs):
        super().__init__()
        self.now = self.peak = 0
        self.seen = {t.untyped_storage()._cdata for t in inputs}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage is not None and storage._cdata not in self.seen:
                self.seen.add(storage._cdata)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())
        return out

    def _free(self, key, size):
        self.seen.discard(key)
        self.now -= size


@pytest.mark.parametrize("global_search", [True, False])
def test_extra_memory_at_480p_stays_under_300_mb(global_search):
    """Wan 1.3B, 81 frames of 480p in bf16: 32,760 tokens, 12 heads of 128, 30 blocks, guidance.

    The peak of matching, reducing and restoring, without the output (b, n, k, d) that full attention creates too, plus
    the plans of all blocks and both branches. Residuals, where the correction is on, come on top.
    """
    part = partition((21, 30, 52), (2, 2, 2), 0, "meta")
    q, k, v = (torch.empty(1, 32_760, 12, 128, dtype=torch.bfloat16, device="meta") for _ in range(3))
    with Peak(q, k, v) as memory:
        plan, other = match(q, part, global_search=global_search), match(v, part, global_search=global_search)
        queries, keys = plan.at_rate(0.3), other.at_rate(0.5)
        reduced = queries.reduce(q), keys.reduce(k, mean=True), keys.reduce(v, mean=True)
        queries.restore(reduced[0])
    latents = torch.empty(1, 16, 21, 60, 104, device="meta")
    config = SimpleNamespace(patch_size=(1, 2, 2), num_attention_heads=12, attention_head_dim=128)
    model = SimpleNamespace(config=config)
    spec = RunSpec(model, Wan(), latents, (21, 30, 52), 50, True, 30)
    plans = AsymRnR(correction="none").estimate_memory(spec)
    assert 50e6 < plans < 110e6
    assert 100e6 < memory.peak - q.nbytes + plans < 300e6
    half = latents.to(torch.bfloat16)
    linear, last = (
        AsymRnR(correction=correction).estimate_memory(spec._replace(latents=half)) - plans
        for correction in ("linear", "last")
    )
    assert linear == 2 * last == 2 * 2 * 30 * q.nbytes  # 12 GB and 6 GB


@pytest.mark.parametrize("groups", [1, 3], ids=["shared", "separate"])
def test_a_bias_folded_into_channels_equals_a_bias_on_the_logits(groups):
    """b, k, d = 2, 3, 16; 5 queries, 7 keys: the same softmax, without a mask."""
    q, k, v = (torch.randn(2, n, 3, 16) for n in (5, 7, 7))
    bias = torch.randint(1, 9, (2, groups, 1, 7)).float().log()
    attend = lambda q, k, v, **more: F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), **more)
    expected = attend(q, k, v, attn_mask=bias)
    got = attend(*fold_bias_into_channels(q, k, v, bias), scale=16**-0.5)[..., :16]
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
