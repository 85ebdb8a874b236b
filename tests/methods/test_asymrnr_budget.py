"""One budget into rates, on tables small enough to see through."""

import pytest

from accel.methods.asymrnr.budget import Profile, allocate, allocate_all_or_none, load_profile, work

FREE = (0.9, 0.9)


@pytest.mark.parametrize("budget", [1.0, 0.9, 0.6, 0.3])
def test_the_budget_is_met(budget):
    """Up to one rung of one of 30 rates, the first of which is a quarter."""
    rates = allocate({name: [(1.0 + i, 2.0)] for i, name in enumerate("abcdefghijklmno")}, budget, FREE)
    assert budget - 0.25 / 15 <= work(rates) <= budget + 1e-9


def test_a_rate_too_low_to_save_time_is_not_used():
    rates = allocate({"a": [(1.0, 1.0)], "b": [(1.0, 1.0)]}, 0.9, FREE)
    assert sorted(rate for spans in rates.values() for pair in spans for rate in pair) == [0, 0, 0, 0.25]


def test_equal_costs_give_equal_rates_and_a_dear_block_less():
    rates = allocate({"a": [(1.0, 1.0)], "b": [(1.0, 1.0)], "dear": [(50.0, 50.0)]}, 0.6, FREE)
    assert max(rates["dear"][0]) < 0.1 < min(rates["a"][0])
    assert abs(rates["a"][0][0] - rates["b"][0][0]) <= 0.05


def test_the_cheap_feature_and_the_cheap_span_are_cut_most():
    rates = allocate({"a": [(9.0, 1.0), (90.0, 10.0)]}, 0.4, FREE, count=2)
    (query, kv), late = rates["a"]
    assert kv > query > 0 and kv > max(late) > 0


def test_ceilings_hold_even_if_the_budget_is_then_missed():
    rates = allocate({"a": [(1.0, 1.0)]}, 0.1, (0.3, 0.5))
    assert rates["a"] == [(0.3, 0.5)] and work(rates) == pytest.approx(0.35)


def test_only_the_steps_that_may_be_reduced_count():
    """10 steps in 2 spans, 4 protected: the first span has 1 step that may be cut, the second 5."""
    rates = allocate({"a": [(1.0, 1.0), (50.0, 50.0)], "b": [(2.0, 1.0), (70.0, 50.0)]}, 0.5, FREE, count=10, first=4)
    assert work(rates, 10, 4) == pytest.approx(0.5, abs=0.03)
    (early, _), *_ = allocate({"a": [(1.0, 1.0), (1.0, 1.0)]}, 0.5, FREE, count=10, first=5).values()
    assert early == (0.0, 0.0)


def test_where_misses_are_carried_the_cheapest_sites_are_reduced_at_the_ceilings_or_not_at_all():
    """10 steps in 2 spans, none protected, whole in a quarter of them: a span saves .74 of its 5 steps of 20."""
    costs = {"a": [(9.0, 1.0), (1.0, 1.0)], "b": [(3.0, 3.0), (2.0, 1.0)]}
    rates = allocate_all_or_none(costs, 0.65, FREE, count=10, first=0, full_share=0.25)
    assert rates == {"a": [(0.0, 0.0), FREE], "b": [(0.0, 0.0), FREE]}
    assert work(rates, 10, 0, 0.25) == pytest.approx(0.63)
    assert allocate_all_or_none(costs, 1.0, FREE, 10, 0, 0.25) == {name: [(0.0, 0.0)] * 2 for name in costs}


def test_where_whole_attentions_cost_more_than_reduction_saves_nothing_is_reduced():
    assert allocate_all_or_none({"a": [(1.0, 1.0)]}, 0.5, (0.3, 0.0), count=10, first=0, full_share=0.5) == {
        "a": [(0.0, 0.0)]
    }


def test_profiles_round_trip_and_strange_files_are_named(tmp_path):
    file = tmp_path / "profile.json"
    profile = Profile(grid=(3, 4, 4), steps=20, rate=0.5, costs={"a": [(1.0, 2.0)], "b": [(3.0, 0.5)]})
    profile.save(file)
    assert load_profile(file, ["b", "a"]) == profile
    with pytest.raises(ValueError, match="profile.json is of a model with 2 attentions, this one has 1"):
        load_profile(file, ["a"])
    with pytest.raises(ValueError, match="nowhere.json' does not exist"):
        load_profile("nowhere.json", ["a"])
    file.write_text('{"grid": [3, 4, 4], "steps": 20, "rate": 0.5, "costs": {"a": []}}')
    with pytest.raises(ValueError, match="profile.json is no profile: costs.a List should have at least 1 item"):
        load_profile(file, ["a"])
