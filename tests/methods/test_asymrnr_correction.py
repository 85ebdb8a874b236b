"""The correction of reduced attentions: when residuals are measured, how they are extrapolated, what they cost."""

import gc

import pytest
import torch

import accel
from accel.core.attention import QKV
from accel.core.trace import Step
from accel.families import family_of
from accel.families.wan import Wan
from accel.methods import METHODS
from accel.methods.asymrnr.correction import Residual, ResidualCache
from accel.methods.base import RunSpec
from accel.ops.token_matching import match, partition

AsymRnR = METHODS["asymrnr"]
FIXED = {"schedule": "fixed", "query_rate": 0.5, "kv_rate": 0.5, "start": 0.1, "cell": "1x2x2", "interval": 3}
LAYER = "blocks.0.attn1"


def step(index: int, sigma: float) -> Step:
    return Step(index, 20, sigma, 0.0, "cond")


def test_the_last_two_residuals_are_extrapolated_by_sigma():
    """1 at sigma .9, 3 at .7: 4 at .6. With the last one only: 3."""
    for depth, expected in ((2, 4.0), (1, 3.0)):
        cache, reductions = ResidualCache(depth, interval=3), (object(), None)
        for index, sigma, value in ((0, 1.0, -5.0), (3, 0.9, 1.0), (6, 0.7, 3.0)):
            cache.add(("a",), step(index, sigma), reductions, torch.tensor([value]))
        assert cache.extrapolate(("a",), step(7, 0.6)).item() == pytest.approx(expected)
        assert cache.nbytes == 4 * depth


def test_of_two_residuals_at_one_noise_level_the_last_one_is_taken():
    cache, reductions = ResidualCache(2, interval=3), (object(), None)
    for index, value in ((3, 1.0), (4, 3.0)):  # Heun evaluates each level twice
        cache.add(("a",), step(index, 0.9), reductions, torch.tensor([value]))
    assert cache.extrapolate(("a",), step(5, 0.8)).item() == 3.0


def test_a_residual_serves_its_own_reductions_until_it_is_too_old():
    cache, reductions = ResidualCache(2, interval=3), (object(), object())
    assert cache.needs_refresh(("a",), step(4, 0.9), reductions)
    cache.add(("a",), step(4, 0.9), reductions, torch.ones(1))
    assert not cache.needs_refresh(("a",), step(6, 0.8), reductions) and cache.needs_refresh(
        ("a",), step(7, 0.7), reductions
    )
    others = (reductions[0], object())
    assert cache.needs_refresh(("a",), step(5, 0.8), others)
    cache.add(("a",), step(5, 0.8), others, torch.full((1,), 9.0))
    assert cache.extrapolate(("a",), step(6, 0.1)).item() == 9  # no line through the residual of other reductions


def test_residuals_that_are_not_fresh_are_dropped():
    """In an exact step that of the unconditional branch, not of the conditional one; after a gap that of either."""
    cache, reductions = ResidualCache(1, interval=3), (object(), None)
    uncond = Step(4, 20, 0.8, 0.0, "uncond")
    for key in ("cond", "uncond"):
        cache.add((key,), step(3, 0.9), reductions, torch.ones(2))
    assert cache.is_fresh(("cond",), step(4, 0.8), exact=True) and not cache.is_fresh(("uncond",), uncond, exact=True)
    assert cache.nbytes == 8
    assert not cache.is_fresh(("cond",), step(7, 0.7)) and cache.nbytes == 0


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "separate"])
@pytest.mark.parametrize("reduce", ["queries", "keys", "both"])
def test_the_reduced_attention_plus_its_residual_is_the_full_attention(reduce, shared, pipe):
    """While the input does not change. Restoring is put off until after the projection only if heads share a plan."""
    torch.manual_seed(0)
    attn, x = pipe.transformer.blocks[0].attn1, torch.randn(1, 48, 24)
    rope = pipe.transformer.rope(torch.randn(1, 4, 3, 8, 8))
    reductions = [
        match(torch.randn(1, 48, 2, 12), partition((3, 4, 4), (1, 2, 2), i), shared=shared).at_rate(0.5) for i in (0, 1)
    ]
    queries, keys = reductions[0] if reduce != "keys" else None, reductions[1] if reduce != "queries" else None

    def reduced(qkv: QKV) -> torch.Tensor:
        return softmax(qkv.query(queries), qkv.key(keys), qkv.value(keys))

    with torch.no_grad():
        full = Wan().qkv(attn, x, rope)
        y = softmax(full.query(), full.key(), full.value())
        residual = full.residual(y, reduced(full), queries)
        out, second = full.project_out(y), Wan().qkv(attn, x, rope)
        got = second.project_out(second.restore(reduced(second), queries, residual))
        torch.testing.assert_close(out, attn(x, None, None, rope), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got, out, rtol=1e-4, atol=1e-5)
    assert residual.abs().max() > 1e-3


def softmax(q, k, v):
    return torch.nn.functional.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)


def test_every_third_attention_runs_both_full_and_reduced(pipe, sample):
    """20 steps, from step 2 on reduced: 2, 5, 8, ... run full, with a core of half the queries and keys in addition."""
    with accel.apply(pipe, [AsymRnR(**FIXED)]) as trace:
        sample(pipe)
    events = {i: trace.events[i, "uncond", LAYER] for i in range(20)}
    assert [i for i, e in events.items() if e.action == "reduce"] == [i for i in range(3, 20) if i % 3 != 2]
    core, projected = 4 * 24 * 24 * 24, 2 * 24 * 24**2
    assert events[5].compute_fraction == pytest.approx(1 + (core + projected) / trace.flops[LAYER])
    assert trace.method_data["asymrnr"]["full_attention_ms"] > 0
    assert trace.method_data["asymrnr"]["rates"][LAYER][5] == [0, 0]
    assert trace.method_data["asymrnr"]["rates"][LAYER][6] == [0.5, 0.5]


@pytest.mark.parametrize("steps", [2, 11])
def test_no_error_is_measured_in_the_last_step_and_a_run_of_two_does_nothing(steps, pipe, sample):
    with accel.apply(pipe, [AsymRnR(**FIXED)]) as trace:
        sample(pipe, steps=steps)
    measured = {e.step for e in trace.events.values() if e.compute_fraction > 1}
    assert measured == ({1, 4, 7} if steps == 11 else set())  # step 10 would be next
    assert any("AsymRnR does nothing" in message for message in trace.messages) == (steps == 2)
    assert (trace.summary()["flops_ratio"] == 1) == (steps == 2)


def test_fixed_rates_act_whatever_the_budget_says(pipe, sample):
    method = AsymRnR(**FIXED, budget=1.0)
    assert not method.is_neutral and AsymRnR(budget=1.0).is_neutral
    with accel.apply(pipe, [method]) as trace:
        sample(pipe)
    assert trace.summary()["flops_ratio"] < 1


def test_correction_brings_the_video_closer_to_the_baseline_at_the_same_rates(pipe, sample):
    baseline, error = sample(pipe, steps=12), {}
    for correction in ("none", "last", "linear"):
        with accel.apply(pipe, [AsymRnR(**FIXED, correction=correction)]):
            error[correction] = (sample(pipe, steps=12) - baseline).square().mean()
    assert error["linear"] < error["last"] < error["none"] / 4


def test_a_branch_that_another_method_seldom_runs_is_not_reduced(pipe, sample):
    """CFG-Cache runs one unconditional pass in ten, a residual is fresh for three steps: these passes are full."""
    cache, nbytes = METHODS["fastercache"](attention=False, guidance_interval=10, guidance_start=0.5), []
    with accel.apply(pipe, [AsymRnR(**FIXED), cache]) as trace:
        sample(pipe, on_step=lambda *_: nbytes.append(trace.memory_by_method.get("asymrnr", 0)) or {})
    assert nbytes[-1] < 0.7 * max(nbytes)  # the residuals of the other branch are freed
    late = {
        (e.branch, e.action, e.compute_fraction > 1) for e in trace.events.values() if e.layer == LAYER and e.step > 11
    }
    assert late == {("cond", "reduce", False), ("cond", "compute", True)} | {("uncond", "compute", False)}


def test_attentions_that_are_computed_too_seldom_to_correct_are_not_reduced_and_this_is_reported(pipe, sample):
    cache = METHODS["fastercache"](attention_interval=3, guidance=False)
    with accel.apply(pipe, [AsymRnR(**FIXED), cache]) as trace:
        sample(pipe)
    assert any("too seldom to correct: raise its interval" in message for message in trace.messages)
    with accel.apply(pipe, [AsymRnR(**{**FIXED, "interval": 7}), cache]) as trace:
        sample(pipe)
    assert not any("too seldom" in message for message in trace.messages)
    assert "reduce" in {e.action for e in trace.events.values()}


@pytest.mark.parametrize("order", [1, -1])
def test_both_branches_run_full_at_steps_whose_cfg_delta_is_cached(order, pipe, sample):
    """CFG-Cache rebuilds steps 11, 13, ...: in 10, 12, ... it takes the CFG delta, with any errors in it."""
    cache = METHODS["fastercache"](attention=False, guidance_interval=2, guidance_start=0.55)
    with accel.apply(pipe, [AsymRnR(**FIXED), cache][::order]) as trace:
        sample(pipe)
    done = {(e.step, e.branch): (e.action, e.compute_fraction > 1) for e in trace.events.values() if e.layer == LAYER}
    for exact in (10, 12, 14, 16):
        assert done[exact, "uncond"] == ("compute", False)
        assert done[exact, "cond"] == ("compute", True) and done[exact + 1, "cond"][0] == "reduce"


def test_without_correction_too_steps_whose_cfg_delta_is_cached_are_not_reduced(pipe, sample):
    cache = METHODS["fastercache"](attention=False, guidance_interval=2, guidance_start=0.55)
    with accel.apply(pipe, [AsymRnR(**FIXED, correction="none"), cache]) as trace:
        sample(pipe)
    done = {(e.step, e.branch): e.action for e in trace.events.values() if e.layer == LAYER}
    for exact in (10, 12, 14, 16):
        assert done[exact, "uncond"] == done[exact, "cond"] == "compute" and done[exact + 1, "cond"] == "reduce"


def test_a_phase_that_is_not_reduced_does_not_count_as_computed_too_seldom(pipe, sample):
    """Rates of 0 in one of five phases, steps 8 to 11: the attention is computed there in full."""
    rates = {"blocks.0.attn1": [[0.5, 0.5], [0.5, 0.5], [0, 0], [0.5, 0.5], [0.5, 0.5]]}
    with accel.apply(pipe, [AsymRnR(**{**FIXED, "query_rate": 0, "kv_rate": 0}, rates=rates)]) as trace:
        sample(pipe)
    assert not [text for text in trace.messages if "too seldom" in text]
    assert trace.events[12, "cond", LAYER].compute_fraction > 1  # both full and reduced: a new error is measured


def test_residuals_of_the_first_transformer_are_not_used_in_the_second(two_models, sample):
    with accel.apply(two_models, [AsymRnR(**FIXED)]) as trace:
        sample(two_models)
    second = next(i for i, sigma in sorted(trace.sigmas.items()) if 1000 * sigma < 700)
    assert trace.events[second, "cond", LAYER].action == "compute"
    assert trace.events[second + 1, "cond", LAYER].action == "reduce"


@pytest.mark.parametrize("correction", ["none", "last", "linear"])
def test_the_memory_estimate_is_not_exceeded(correction, pipe, sample):
    """A residual is one tensor (b, n, d) for each block and branch; a line needs two."""
    method, latents = AsymRnR(**FIXED, correction=correction), torch.empty(1, 4, 3, 8, 8)
    expected = method.estimate_memory(RunSpec(pipe.transformer, family_of(pipe), latents, (3, 4, 4), 20, True, 2))
    with accel.apply(pipe, [method]) as trace:
        sample(pipe)
    assert expected / 2 < trace.peak_bytes <= expected
    tensors = {"none": 0, "last": 1, "linear": 2}[correction]
    bare = AsymRnR(**FIXED, correction="none").estimate_memory(
        RunSpec(pipe.transformer, family_of(pipe), latents, (3, 4, 4), 20, True, 2)
    )
    assert expected - bare == tensors * 2 * 2 * 48 * 24 * 4


def test_no_residual_is_kept_while_the_video_is_decoded(pipe, sample):
    residuals = lambda: {id(found) for found in gc.get_objects() if type(found) is Residual}
    gc.collect()
    before = residuals()
    with accel.apply(pipe, METHODS["asymrnr"](schedule="fixed", query_rate=0.5, kv_rate=0.5, start=0.1)) as trace:
        sample(pipe)
        assert trace.summary()["flops_ratio"] < 1
        assert residuals() <= before
