"""The ranking of votes: cases by hand, simulated votes, ties, both bad."""

import numpy as np
import pytest

from ui.ranking import MIN_VOTES, ranking, ranking_report, strengths
from ui.store import Vote


def votes(x: str, y: str, /, **winners: int) -> list[Vote]:
    """votes("x", "y", a=3, b=1): three for x, one for y."""
    return [Vote(f"{x}-{y}", winner, (x, y)) for winner, count in winners.items() for _ in range(count)]


def test_two_settings_score_their_share_of_the_votes():
    best, worst = ranking(votes("x", "y", a=3000, b=1000))
    assert (best.name, worst.name) == ("x", "y")
    assert best.score == pytest.approx(0.75, abs=1e-3) and worst.score == pytest.approx(0.25, abs=1e-3)
    assert best.votes == worst.votes == 4000
    assert best.high - best.low == pytest.approx(2 * 1.96 * (0.75 * 0.25 / 4000) ** 0.5, rel=0.1)  # of a proportion


def test_strengths_of_three_settings_match_the_odds():
    odds = np.array([4.0, 2.0, 1.0])  # i beats j with odds[i] : odds[j]
    wins = 60_000 * odds[:, None] / (odds[:, None] + odds[None, :])
    np.fill_diagonal(wins, 0)
    assert strengths(wins) == pytest.approx(np.log(odds / 2), abs=1e-3)  # the prior makes their mean 0


def test_a_tie_is_half_a_win_for_each_whichever_side_a_setting_is_on():
    ties = ranking(votes("x", "y", a=1, b=1, same=20))
    assert [rank.score for rank in ties] == pytest.approx([0.5, 0.5], abs=1e-6)
    mixed = {rank.name: rank.score for rank in ranking(votes("x", "y", a=200, same=200) + votes("y", "x", same=400))}
    assert mixed["x"] == pytest.approx(500 / 800, abs=1e-3)


def test_both_bad_is_a_share_of_its_own_and_no_tie():
    best, worst = ranking(votes("x", "y", a=30, bad=10))
    assert best.name == "x" and best.score > 0.9 and best.bad == worst.bad == 0.25
    assert [rank.score for rank in ranking(votes("x", "y", bad=40))] == [0.5, 0.5]


def test_a_setting_that_never_lost_is_the_more_certain_the_more_votes_it_has():
    few, many = (ranking(votes("x", "y", a=count))[0] for count in (2, 100))
    assert few.low < 0.5 < few.score < many.low < many.score < 1


def test_one_lucky_vote_does_not_lead():
    assert ranking(votes("x", "y", a=80, b=20) + votes("lucky", "y", a=1))[0].name == "x"


def test_settings_that_never_met_are_ranked_over_others():
    order = [rank.name for rank in ranking(votes("x", "y", a=30, b=10) + votes("y", "z", a=30, b=10))]
    assert order == ["x", "y", "z"]


def test_simulated_votes_give_back_the_true_order_and_intervals_that_hold_the_truth():
    rng, truth = np.random.default_rng(1), {"a": 1.2, "b": 0.4, "c": -0.4, "d": -1.2}
    cast, names = [], list(truth)
    for _ in range(1200):
        x, y = rng.choice(names, 2, replace=False)
        first = rng.random() < 1 / (1 + np.exp(truth[y] - truth[x]))
        cast.append(Vote("p", "a" if first else "b", (str(x), str(y))))
    ranks = ranking(cast)
    assert [rank.name for rank in ranks] == names
    for rank in ranks:
        others = [theta for name, theta in truth.items() if name != rank.name]
        expected = np.mean([1 / (1 + np.exp(theta - truth[rank.name])) for theta in others])
        assert rank.low < expected < rank.high and rank.high - rank.low < 0.12
    assert ranking(cast) == ranks  # seeded


def test_a_setting_against_itself_and_no_votes_rank_nothing():
    assert ranking([]) == [] and ranking(votes("x", "x", a=5)) == []


def test_the_ranking_appears_at_enough_votes():
    few = tuple(votes("x", "y", a=MIN_VOTES - 1))
    assert ranking_report(few) == {"votes": 29, "needed": 30, "ranking": []}
    assert [row["name"] for row in ranking_report((*few, few[0]))["ranking"]] == ["x", "y"]


def test_only_the_settings_with_most_votes_are_ranked(monkeypatch):
    monkeypatch.setattr("ui.ranking.MAX_NAMES", 2)
    assert [rank.name for rank in ranking([*votes("x", "y", a=3, b=1), *votes("x", "z", a=2)])] == ["x", "y"]
