"""AsymRnR on a small random Wan: rates, windows of steps, schedules, limits, and one compiled graph."""

import pytest
import torch

import accel
from accel.core.host import Host
from accel.core.lazy_qkv import LazyQKV
from accel.core.trace import Trace
from accel.families import family_of
from accel.families.wan import Wan
from accel.methods import METHODS
from accel.methods.asymrnr.budget import Profile
from accel.methods.base import RunSpec
from accel.ops.token_matching import match
from accel.runtime.presets import build_methods

AsymRnR = METHODS["asymrnr"]
FIXED = {"schedule": "fixed", "query_rate": 0.3, "kv_rate": 0.5, "start": 0.1, "cell": "1x2x2", "correction": "none"}
COSTS = {"blocks.0.attn1": [(100.0, 100.0)], "blocks.1.attn1": [(1.0, 1.0)]}
PROFILE = Profile(grid=(3, 4, 4), steps=20, rate=0.5, costs=COSTS)


def lengths(pipe, sample, method, **run):
    """(query, key) lengths at each attention core, by (step, branch, layer), and the trace."""
    seen = {}
    host = Host(pipe, Trace())

    def spy(inner, qkv, layer):
        seen[host.step.index, host.step.branch, layer] = (qkv.query().shape[1], qkv.key().shape[1])
        return inner(qkv)

    with host.wrap_qkv(spy), method.apply(host, host.trace), host.attached():
        sample(pipe, **run)
    return seen, host.trace


def test_fixed_rates_reduce_queries_and_keys_separately(pipe, sample):
    """3 x 4 x 4 = 48 tokens: 30 % of the queries and 50 % of the keys are removed, from the third of 20 steps on."""
    seen, trace = lengths(pipe, sample, AsymRnR(**FIXED))
    assert {v for (step, *_), v in seen.items() if step < 2} == {(48, 48)}
    assert {v for (step, *_), v in seen.items() if step >= 2} == {(34, 24)}


def test_removed_tokens_are_not_projected_while_a_matching_is_reused(pipe, sample):
    """14 queries and 24 keys are removed. Matching needs all q and v; without it k, v, q and the output are shorter."""
    _, trace = lengths(pipe, sample, AsymRnR(**FIXED, merge="values"))
    core, token, full = 4 * 48 * 48 * 24, 2 * 24**2, trace.flops["blocks.0.attn1"]
    for step, removed in ((2, 24 + 14), (3, 14 + 24 + 24 + 14)):
        saved = (1 - 34 * 24 / 48**2) * core + removed * token
        assert trace.events[step, "cond", "blocks.0.attn1"].compute_fraction == pytest.approx(1 - saved / full)


@pytest.mark.parametrize("merge", ["mean", "values", "replace"])
def test_projecting_only_the_remaining_tokens_gives_the_same_video(merge, pipe, sample, monkeypatch):
    method = AsymRnR(**FIXED, merge=merge)
    with accel.apply(pipe, [method]):
        lazy = sample(pipe)
    monkeypatch.setattr(LazyQKV, "_can_reduce_first", lambda self, reduction: False)
    with accel.apply(pipe, [method]) as trace:
        torch.testing.assert_close(sample(pipe), lazy, rtol=1e-4, atol=1e-4)
    assert trace.events[3, "cond", "blocks.0.attn1"].action == "reduce"


def test_queries_or_keys_can_be_reduced_alone(pipe, sample):
    only_queries, _ = lengths(pipe, sample, AsymRnR(**{**FIXED, "kv_rate": 0.0}))
    only_keys, _ = lengths(pipe, sample, AsymRnR(**{**FIXED, "query_rate": 0.0}))
    assert only_queries[5, "cond", "blocks.1.attn1"] == (34, 48)
    assert only_keys[5, "cond", "blocks.1.attn1"] == (48, 24)


def test_matching_runs_once_for_each_window_of_steps_and_branch(pipe, sample, monkeypatch):
    """20 steps, the first two not reduced, windows of 3: 6 windows x 2 branches x 2 blocks x 2 features."""
    calls = []
    monkeypatch.setattr("accel.methods.asymrnr.plan_cache.match", lambda *args: calls.append(1) or match(*args))
    with accel.apply(pipe, [AsymRnR(**FIXED, interval=3)]):
        sample(pipe)
    assert len(calls) == 6 * 2 * 2 * 2


def test_the_budget_is_met_over_the_run(pipe, sample):
    _, trace = lengths(pipe, sample, AsymRnR(budget=0.6, correction="none"))
    assert attention_left(trace) == pytest.approx(0.6, abs=0.04)
    assert set(trace.method_data["asymrnr"]["rates"]) == {"blocks.0.attn1", "blocks.1.attn1"}


def test_a_budget_out_of_reach_is_reported(pipe, sample):
    _, trace = lengths(pipe, sample, AsymRnR(budget=0.2, query_rate=0.1, kv_rate=0.1))
    assert any("budget of 0.2 is out of reach" in message for message in trace.messages)


def test_a_profile_decides_where_tokens_are_removed(pipe, sample, tmp_path):
    PROFILE.save(tmp_path / "costs.json")
    _, trace = lengths(pipe, sample, AsymRnR(budget=0.8, correction="none", profile=str(tmp_path / "costs.json")))
    rates = trace.method_data["asymrnr"]["rates"]
    assert rates["blocks.0.attn1"][1] == [0, 0]  # before the first reduced step
    assert max(rates["blocks.0.attn1"][10]) < min(rates["blocks.1.attn1"][10])


def test_the_profile_in_the_models_folder_is_used_and_its_absence_reported(pipe, sample, tmp_path):
    PROFILE.save(tmp_path / "asymrnr.json")
    _, trace = lengths(pipe, sample, AsymRnR(budget=0.8))
    assert any("this model has no profile" in message for message in trace.messages)
    pipe.register_to_config(_name_or_path=str(tmp_path))
    _, trace = lengths(pipe, sample, AsymRnR(budget=0.8))
    rates = trace.method_data["asymrnr"]["rates"]
    assert not trace.messages and max(rates["blocks.0.attn1"][10]) < min(rates["blocks.1.attn1"][10])
    PROFILE.model_copy(update={"grid": (9, 8, 8)}).save(tmp_path / "asymrnr.json")
    _, trace = lengths(pipe, sample, AsymRnR(budget=0.8))
    assert "AsymRnR: the costs were measured on a grid of (9, 8, 8) tokens, this one is (3, 4, 4)" in trace.messages


def test_rates_can_be_given_for_each_block_and_phase(pipe, sample):
    """20 steps: from the third on 8 at the first pair of rates, then 10 at the second."""
    table = {"blocks.1.attn1": [(0.5, 0.0), (0.0, 0.25)]}
    seen, _ = lengths(pipe, sample, AsymRnR(**{**FIXED, "rates": table}))
    assert [seen[i, "cond", "blocks.1.attn1"] for i in (1, 9, 10)] == [(48, 48), (24, 48), (48, 36)]
    assert seen[10, "cond", "blocks.0.attn1"] == (48, 48)


@pytest.mark.parametrize("start", [0.1, 1.0], ids=["used", "unused"])
def test_rates_and_profiles_of_another_model_are_refused_whether_they_are_used_or_not(start, pipe, sample, tmp_path):
    other = {"schedule": "fixed", "start": start, "rates": {"blocks.7": [(0.5, 0.5)]}}
    with pytest.raises(ValueError, match="there is no attention 'blocks.7' to give a rate; there are blocks.0.attn1,"):
        lengths(pipe, sample, AsymRnR(**other), steps=2)
    PROFILE.model_copy(update={"costs": {"blocks.7": [(1.0, 1.0)]}}).save(tmp_path / "other.json")
    with pytest.raises(ValueError, match="profile other.json is of a model with 1 attention, this one has 2"):
        lengths(pipe, sample, AsymRnR(start=start, profile=str(tmp_path / "other.json")), steps=2)


def test_the_similarity_of_blocks_that_another_method_skips_is_measured_in_the_next_step(pipe, sample):
    """FasterCache reuses the attentions of step 4, the last one before AsymRnR would reduce."""
    reuse = METHODS["fastercache"](attention_start=0.1, attention_interval=2, guidance=False)
    with accel.apply(pipe, [AsymRnR(schedule="similarity", start=0.25, correction="none"), reuse]) as trace:
        sample(pipe)
    reused, reduced = ({e.step for e in trace.events.values() if e.action == a} for a in ("reuse", "reduce"))
    assert {4, 6} <= reused and min(reduced) == 7 and not trace.messages


def attention_left(trace) -> float:
    """Mean share of the attention cores' work that was computed."""
    rates = [pair for steps in trace.method_data["asymrnr"]["rates"].values() for pair in steps]
    return sum((1 - query) * (1 - kv) for query, kv in rates) / len(rates)


@pytest.mark.parametrize("schedule", ["similarity", "profiled"])
def test_the_budget_is_met_by_two_transformers_together(schedule, two_models, sample, tmp_path):
    """Measuring similarity costs the second one a step of its own, which is not reduced."""
    costly_early = {layer: [(9.0, 9.0), (1.0, 1.0), (1.0, 1.0)] for layer in COSTS}
    PROFILE.model_copy(update={"costs": costly_early}).save(tmp_path / "asymrnr.json")
    two_models.register_to_config(_name_or_path=str(tmp_path))
    method = AsymRnR(schedule=schedule, budget=0.6, query_rate=0.8, kv_rate=0.8, correction="none")
    _, trace = lengths(two_models, sample, method)
    assert attention_left(trace) == pytest.approx(0.6, abs=0.05)
    assert not any("out of reach" in message for message in trace.messages)
    given = two_models.transformer, family_of(two_models), torch.empty(1, 4, 3, 8, 8), (3, 4, 4), 20, True, 2
    assert trace.peak_bytes <= method.estimate_memory(RunSpec(*given))


def test_one_matching_for_both_has_one_rate_that_leaves_the_same_work(pipe, sample):
    """Rates .3 and .5 leave .35 of the work; one rate does so at .41: 29 of 48 tokens stay."""
    seen, trace = lengths(pipe, sample, AsymRnR(**FIXED, pairing="one"))
    assert seen[5, "cond", "blocks.0.attn1"] == (29, 29)
    assert trace.method_data["asymrnr"]["rates"]["blocks.0.attn1"][5] == pytest.approx([0.4084, 0.4084], abs=1e-3)


def test_impossible_rates_are_refused_before_a_run():
    with pytest.raises(ValueError, match="rates per block need schedule fixed, not profiled"):
        AsymRnR(rates={"blocks.0.attn1": [(0.5, 0.5)]})
    with pytest.raises(ValueError, match="asymrnr: rate 0.9 is not possible: cells of 1x2x2 allow 0 to 0.750"):
        build_methods({"asymrnr": {**FIXED, "kv_rate": 0.9}})


def test_a_threshold_that_no_block_reaches_is_reported(pipe, sample):
    seen, trace = lengths(pipe, sample, AsymRnR(**FIXED, threshold=1.0))
    assert set(seen.values()) == {(48, 48)}
    assert any("does nothing: the threshold is 1.0, the highest similarity is" in message for message in trace.messages)


def test_global_matching_counts_as_work(pipe, sample):
    """12 destinations, 36 sources, 24 channels: 2 x 12 x 36 x 24 for queries and for values, once a window."""
    work = {}
    for matching in ("global", "cell"):
        _, trace = lengths(pipe, sample, AsymRnR(**{**FIXED, "start": 0.5}, matching=matching), steps=2)
        event = trace.events[1, "cond", "blocks.0.attn1"]
        work[matching] = event.compute_fraction * trace.flops["blocks.0.attn1"]
    assert work["global"] - work["cell"] == pytest.approx(2 * 2 * 12 * 36 * 24)


def test_the_trace_shows_which_tokens_of_the_middle_frame_stay(pipe, sample):
    _, trace = lengths(pipe, sample, AsymRnR(**FIXED))
    kept = trace.method_data["asymrnr"]["kept_tokens"]["blocks.0.attn1"]
    assert [len(row) for row in kept["kv"]] == [4, 4, 4, 4] and {*"".join(kept["kv"])} == {"0", "1"}


@pytest.mark.parametrize("schedule", ["fixed", "similarity"])
def test_tokens_that_are_not_the_grid_are_not_reduced_and_this_is_reported(schedule, pipe, sample, monkeypatch):
    monkeypatch.setattr(Wan, "grid", lambda *_: (3, 4, 5))
    seen, trace = lengths(pipe, sample, AsymRnR(**{**FIXED, "schedule": schedule}))
    assert set(seen.values()) == {(48, 48)}
    assert "AsymRnR is off: 48 tokens are not the grid of (3, 4, 5)" in trace.messages


def test_a_model_with_little_attention_is_not_reduced_and_this_is_reported(pipe, sample, monkeypatch):
    monkeypatch.setattr("accel.methods.asymrnr.reducer.MIN_CORE_SHARE", 0.9)
    seen, trace = lengths(pipe, sample, AsymRnR())
    assert set(seen.values()) == {(48, 48)}
    assert trace.messages[0].startswith("AsymRnR is off: the attention cores are ")


def test_context_parallelism_is_refused_with_the_reason(pipe):
    pipe.transformer.blocks[0].attn1.processor._parallel_config = object()
    with pytest.raises(ValueError, match="tokens cannot be reduced under context parallelism"):
        with accel.apply(pipe, [AsymRnR()]):
            pass


def test_the_same_seed_gives_the_same_video_and_global_random_state_is_untouched(pipe, sample):
    before = torch.get_rng_state()
    with accel.apply(pipe, [AsymRnR()]):
        one, two = sample(pipe), sample(pipe)
    assert torch.equal(one, two) and torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("order", [("fastercache", "asymrnr"), ("asymrnr", "fastercache")])
def test_fastercache_and_asymrnr_both_act_together(order, pipe, sample):
    with accel.apply(pipe, [METHODS[name]() for name in order]) as trace:
        sample(pipe)
    done = {e.action for e in trace.events.values()}
    assert {"reuse", "rebuild", "reduce"} <= done


def test_an_attention_backend_set_inside_the_context_stays_set(pipe, sample):
    with accel.apply(pipe, [AsymRnR()]):
        expected = sample(pipe)
        pipe.transformer.set_attention_backend("_native_math")
        torch.testing.assert_close(sample(pipe), expected, rtol=1e-3, atol=1e-3)
    assert pipe.transformer.blocks[0].attn1.processor._attention_backend is not None


@pytest.mark.parametrize("correction", ["none", "linear"])
def test_compiled_blocks_share_one_graph_and_do_not_recompile_when_a_rate_changes(correction, pipe, sample):
    torch._dynamo.reset()
    parameters = {**FIXED, "start": 0.0, "correction": correction, "interval": 2}
    with accel.apply(pipe, [AsymRnR(**parameters)]):
        expected = sample(pipe, steps=4)
    pipe.transformer.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    torch._dynamo.utils.counters.clear()
    for kv_rate in (0.5, 0.3, 0.0):
        with accel.apply(pipe, [AsymRnR(**{**parameters, "kv_rate": kv_rate})]):
            got = sample(pipe, steps=4)
        if kv_rate == 0.5:
            torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_tokens_are_reduced_in_half_precision_with_a_rotary_table_in_half_precision(pipe, sample):
    pipe.transformer.to(torch.bfloat16)
    assert pipe.transformer.rope.freqs_cos.dtype == torch.bfloat16
    with accel.apply(pipe, [AsymRnR(**FIXED)]) as trace:
        assert sample(pipe).isfinite().all()
    assert "reduce" in {e.action for e in trace.events.values()}


def test_measuring_similarity_counts_as_work(pipe, sample):
    """All 48 tokens against one destination in each of the 12 cells of four, for queries and for values."""
    parameters = {**FIXED, "threshold": 0.01, "matching": "global"}
    with accel.apply(pipe, [AsymRnR(**parameters)]) as trace:
        sample(pipe)
    layer = "blocks.0.attn1"
    assert trace.events[1, "cond", layer].compute_fraction == pytest.approx(
        1 + 2 * (2 * 12 * 36 * 24) / trace.flops[layer]
    )
