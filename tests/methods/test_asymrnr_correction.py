"""What reduced attentions miss: when it is learnt, how it is carried on, and what it costs."""

import pytest
import torch

import accel
from accel.core.attention import QKV
from accel.core.trace import Step
from accel.families import family_of
from accel.families.wan import Wan
from accel.methods import METHODS
from accel.methods.asymrnr.correction import ResidualCache
from accel.methods.base import RunSpec
from accel.ops.tokens import match, partition

AsymRnR = METHODS["asymrnr"]
FIXED = {"schedule": "fixed", "query_rate": 0.5, "kv_rate": 0.5, "start": 0.1, "cell": "1x2x2", "interval": 3}
SITE = "blocks.0.attn1"


def step(index: int, sigma: float) -> Step:
    return Step(index, 20, sigma, 0.0, "cond")


def test_the_line_goes_through_the_last_two_differences_by_noise_level():
    """1 at a level of .9, 3 at .7: 4 at .6. As last seen: 3."""
    for depth, expected in ((2, 4.0), (1, 3.0)):
        carried, cuts = ResidualCache(depth, interval=3), (object(), None)
        for index, sigma, value in ((0, 1.0, -5.0), (3, 0.9, 1.0), (6, 0.7, 3.0)):
            carried.add(("a",), step(index, sigma), cuts, torch.tensor([value]))
        assert carried.now(("a",), step(7, 0.6)).item() == pytest.approx(expected)
        assert carried.held == 4 * depth


def test_a_difference_serves_its_own_cuts_until_it_is_too_old():
    carried, cuts = ResidualCache(2, interval=3), (object(), object())
    assert carried.due(("a",), step(4, 0.9), cuts)
    carried.add(("a",), step(4, 0.9), cuts, torch.ones(1))
    assert not carried.due(("a",), step(6, 0.8), cuts) and carried.due(("a",), step(7, 0.7), cuts)
    others = (cuts[0], object())
    assert carried.due(("a",), step(5, 0.8), others)
    carried.add(("a",), step(5, 0.8), others, torch.full((1,), 9.0))
    assert carried.now(("a",), step(6, 0.1)).item() == 9  # no line through what other cuts missed


def test_what_serves_no_longer_is_forgotten():
    """The unconditional branch's in an anchor step, and anybody's after a gap; the conditional one's serves on."""
    carried, cuts = ResidualCache(1, interval=3), (object(), None)
    uncond = Step(4, 20, 0.8, 0.0, "uncond")
    for key in ("cond", "uncond"):
        carried.add((key,), step(3, 0.9), cuts, torch.ones(2))
    assert carried.serves(("cond",), step(4, 0.8), anchor=True) and not carried.serves(("uncond",), uncond, anchor=True)
    assert carried.held == 8
    assert not carried.serves(("cond",), step(7, 0.7)) and carried.held == 0


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "a head each"])
@pytest.mark.parametrize("short", ["queries", "keys", "both"])
def test_reduced_with_what_it_missed_is_the_whole_attention(short, shared, pipe):
    """While nothing changes. The restored output waits for its projection only where heads share a plan."""
    torch.manual_seed(0)
    attn, x = pipe.transformer.blocks[0].attn1, torch.randn(1, 48, 24)
    rope = pipe.transformer.rope(torch.randn(1, 4, 3, 8, 8))
    cuts = [
        match(torch.randn(1, 48, 2, 12), partition((3, 4, 4), (1, 2, 2), i), shared=shared).at_rate(0.5) for i in (0, 1)
    ]
    queries, keys = cuts[0] if short != "keys" else None, cuts[1] if short != "queries" else None

    def reduced(heads: QKV) -> torch.Tensor:
        return softmax(heads.query(queries), heads.key(keys), heads.value(keys))

    with torch.no_grad():
        whole = Wan().qkv(attn, x, rope)
        y = softmax(whole.query(), whole.key(), whole.value())
        residual = whole.residual(y, reduced(whole), queries)
        out, again = whole.project_out(y), Wan().qkv(attn, x, rope)
        got = again.project_out(again.restore(reduced(again), queries, residual))
        torch.testing.assert_close(out, attn(x, None, None, rope), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got, out, rtol=1e-4, atol=1e-5)
    assert residual.abs().max() > 1e-3


def softmax(q, k, v):
    return torch.nn.functional.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)


def test_every_third_attention_runs_whole_and_beside_it_reduced(pipe, sample):
    """20 steps, the first two plain: 2, 5, 8, ... are whole, with a core of half the queries and keys on top."""
    with accel.apply(pipe, [AsymRnR(**FIXED)]) as trace:
        sample(pipe)
    events = {i: trace.events[i, "uncond", SITE] for i in range(20)}
    assert [i for i, e in events.items() if e.action == "reduce"] == [i for i in range(3, 20) if i % 3 != 2]
    core, projected = 4 * 24 * 24 * 24, 2 * 24 * 24**2
    assert events[5].compute_fraction == pytest.approx(1 + (core + projected) / trace.flops[SITE])
    assert trace.method_data["asymrnr"]["full_attention_ms"] > 0
    assert trace.method_data["asymrnr"]["rates"][SITE][5] == [0, 0]
    assert trace.method_data["asymrnr"]["rates"][SITE][6] == [0.5, 0.5]


def test_carrying_brings_the_video_closer_to_the_plain_one_at_the_same_rates(pipe, sample):
    plain, apart = sample(pipe), {}
    for correction in ("none", "last", "linear"):
        with accel.apply(pipe, [AsymRnR(**FIXED, correction=correction)]):
            apart[correction] = (sample(pipe) - plain).square().mean()
    assert apart["linear"] < apart["last"] < apart["none"] / 4


def test_a_branch_that_another_method_seldom_runs_learns_nothing(pipe, sample):
    """CFG-Cache leaves one unconditional pass in ten; a difference serves for three steps: those passes are plain."""
    cache, held = METHODS["fastercache"](attention=False, guidance_interval=10, guidance_start=0.5), []
    with accel.apply(pipe, [AsymRnR(**FIXED), cache]) as trace:
        sample(pipe, on_step=lambda *_: held.append(trace.memory_by_method.get("asymrnr", 0)) or {})
    assert held[-1] < 0.7 * max(held)  # what the other branch had learnt is given back
    late = {
        (e.branch, e.action, e.compute_fraction > 1) for e in trace.events.values() if e.layer == SITE and e.step > 11
    }
    assert late == {("cond", "reduce", False), ("cond", "compute", True)} | {("uncond", "compute", False)}


def test_attentions_that_are_computed_too_seldom_to_carry_are_whole_and_it_is_said(pipe, sample):
    cache = METHODS["fastercache"](attention_interval=3, guidance=False)
    with accel.apply(pipe, [AsymRnR(**FIXED), cache]) as trace:
        sample(pipe)
    assert any("too seldom to carry: raise its interval" in note for note in trace.messages)
    with accel.apply(pipe, [AsymRnR(**{**FIXED, "interval": 7}), cache]) as trace:
        sample(pipe)
    assert not any("too seldom" in note for note in trace.messages)
    assert "reduce" in {e.action for e in trace.events.values()}


@pytest.mark.parametrize("order", [1, -1])
def test_both_branches_are_whole_where_their_difference_is_held(order, pipe, sample):
    """CFG-Cache rebuilds steps 11, 13, ...: in 10, 12, ... it takes the branches' difference, errors included."""
    cache = METHODS["fastercache"](attention=False, guidance_interval=2, guidance_start=0.55)
    with accel.apply(pipe, [AsymRnR(**FIXED), cache][::order]) as trace:
        sample(pipe)
    done = {(e.step, e.branch): (e.action, e.compute_fraction > 1) for e in trace.events.values() if e.layer == SITE}
    for anchor in (10, 12, 14, 16):
        assert done[anchor, "uncond"] == ("compute", False)
        assert done[anchor, "cond"] == ("compute", True) and done[anchor + 1, "cond"][0] == "reduce"


def test_nothing_of_the_first_transformer_is_carried_into_the_second(two_models, sample):
    with accel.apply(two_models, [AsymRnR(**FIXED)]) as trace:
        sample(two_models)
    second = next(i for i, sigma in sorted(trace.sigmas.items()) if 1000 * sigma < 700)
    assert trace.events[second, "cond", SITE].action == "compute"
    assert trace.events[second + 1, "cond", SITE].action == "reduce"


@pytest.mark.parametrize("correction", ["none", "last", "linear"])
def test_the_forecast_is_not_exceeded(correction, pipe, sample):
    """What is carried is one tensor (b, n, d) a block and branch, or two for a line."""
    method, latents = AsymRnR(**FIXED, correction=correction), torch.empty(1, 4, 3, 8, 8)
    expected = method.estimate_memory(RunSpec(pipe.transformer, family_of(pipe), latents, 20, True, 2))
    with accel.apply(pipe, [method]) as trace:
        sample(pipe)
    assert expected / 2 < trace.peak_bytes <= expected
    tensors = {"none": 0, "last": 1, "linear": 2}[correction]
    bare = AsymRnR(**FIXED, correction="none").estimate_memory(
        RunSpec(pipe.transformer, family_of(pipe), latents, 20, True, 2)
    )
    assert expected - bare == tensors * 2 * 2 * 48 * 24 * 4
