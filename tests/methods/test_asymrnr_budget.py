"""Distributing a budget over layers and phases, on tables small enough to check by hand; and profile files."""

from pathlib import Path

import pytest

from accel.methods.asymrnr.budget import Profile, allocate, allocate_all_or_none, load_profile, mean_work
from accel.runtime.presets import build_methods

FREE = (0.9, 0.9)


@pytest.mark.parametrize("budget", [1.0, 0.9, 0.6, 0.3])
def test_the_budget_is_met(budget):
    """Up to one step of one of 30 rates; the lowest rate is a quarter."""
    rates = allocate({name: [(1.0 + i, 2.0)] for i, name in enumerate("abcdefghijklmno")}, budget, FREE)
    assert budget - 0.25 / 15 <= mean_work(rates) <= budget + 1e-9


def test_a_rate_too_low_to_save_time_is_not_used():
    rates = allocate({"a": [(1.0, 1.0)], "b": [(1.0, 1.0)]}, 0.9, FREE)
    assert sorted(rate for phases in rates.values() for pair in phases for rate in pair) == [0, 0, 0, 0.25]


def test_equal_costs_give_equal_rates_and_a_costly_block_a_lower_one():
    rates = allocate({"a": [(1.0, 1.0)], "b": [(1.0, 1.0)], "costly": [(50.0, 50.0)]}, 0.6, FREE)
    assert max(rates["costly"][0]) < 0.1 < min(rates["a"][0])
    assert abs(rates["a"][0][0] - rates["b"][0][0]) <= 0.05


def test_the_cheapest_feature_and_phase_are_reduced_most():
    rates = allocate({"a": [(9.0, 1.0), (90.0, 10.0)]}, 0.4, FREE, count=2)
    (query, kv), late = rates["a"]
    assert kv > query > 0 and kv > max(late) > 0


def test_ceilings_hold_even_if_the_budget_is_out_of_reach():
    rates = allocate({"a": [(1.0, 1.0)]}, 0.1, (0.3, 0.5))
    assert rates["a"] == [(0.3, 0.5)] and mean_work(rates) == pytest.approx(0.35)


def test_only_the_steps_that_may_be_reduced_count():
    """10 steps in 2 phases, 4 never reduced: the first phase has 1 step that may be reduced, the second 5."""
    rates = allocate({"a": [(1.0, 1.0), (50.0, 50.0)], "b": [(2.0, 1.0), (70.0, 50.0)]}, 0.5, FREE, count=10, first=4)
    assert mean_work(rates, 10, 4) == pytest.approx(0.5, abs=0.03)
    (early, _), *_ = allocate({"a": [(1.0, 1.0), (1.0, 1.0)]}, 0.5, FREE, count=10, first=5).values()
    assert early == (0.0, 0.0)


def test_with_correction_the_cheapest_layers_are_reduced_at_the_ceilings_and_the_others_not_at_all():
    """10 steps in 2 phases, full in a quarter of them: a reduced phase saves .74 of its 5 steps, of 20 in all."""
    costs = {"a": [(9.0, 1.0), (1.0, 1.0)], "b": [(3.0, 3.0), (2.0, 1.0)]}
    rates = allocate_all_or_none(costs, 0.65, FREE, count=10, first=0, full_share=0.25)
    assert rates == {"a": [(0.0, 0.0), FREE], "b": [(0.0, 0.0), FREE]}
    assert mean_work(rates, 10, 0, 0.25) == pytest.approx(0.63)
    assert allocate_all_or_none(costs, 1.0, FREE, 10, 0, 0.25) == {name: [(0.0, 0.0)] * 2 for name in costs}


def test_nothing_is_reduced_if_the_full_attentions_cost_more_than_reduction_saves():
    assert allocate_all_or_none({"a": [(1.0, 1.0)]}, 0.5, (0.3, 0.0), count=10, first=0, full_share=0.5) == {
        "a": [(0.0, 0.0)]
    }


def test_profiles_round_trip_and_other_files_are_refused(tmp_path):
    file = tmp_path / "profile.json"
    profile = Profile(grid=(3, 4, 4), steps=20, rate=0.5, costs={"a": [(1.0, 2.0)], "b": [(3.0, 0.5)]})
    profile.save(file)
    assert load_profile(file, ["b", "a"]) == profile
    with pytest.raises(ValueError, match="profile.json is of a model with 2 attentions, this one has 1"):
        load_profile(file, ["a"])
    with pytest.raises(ValueError, match="nowhere.json' does not exist"):
        load_profile(Path("nowhere.json"), ["a"])
    file.write_text('{"grid": [3, 4, 4], "steps": 20, "rate": 0.5, "costs": {"a": []}}')
    with pytest.raises(ValueError, match="profile.json is no profile: costs.a List should have at least 1 item"):
        load_profile(file, ["a"])


@pytest.mark.parametrize("content", [b"\x89PNG\xff\x00", '{"grid": "ä"}'.encode("latin-1"), b"[1, 2", b""])
def test_a_profile_that_is_not_json_is_refused_in_one_sentence(content, tmp_path):
    file = tmp_path / "profile.json"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"^[^\n]*profile.json is no profile: Invalid JSON: [^\n]*$"):
        load_profile(file, ["a"])


@pytest.mark.parametrize("schedule", ["fixed", "similarity", "profiled"])
def test_a_profile_that_does_not_exist_is_refused_whether_it_is_used_or_not(schedule):
    settings = {"schedule": schedule, "budget": 1.0, "profile": "nowhere.json", "query_rate": 0.5, "kv_rate": 0.5}
    with pytest.raises(ValueError, match="asymrnr.profile: profile 'nowhere.json' does not exist"):
        build_methods({"asymrnr": settings})
