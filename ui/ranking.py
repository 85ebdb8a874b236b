"""Ranks settings from blind votes: a Bradley-Terry model with bootstrap intervals.

A weak Gaussian prior keeps strengths finite. A bootstrap alone would call a setting certain that won both of its two
votes, so every resample also draws the centre of the prior anew: where votes are few the interval is nearly as wide as
the prior, where they are many it is that of the bootstrap.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import lru_cache

import numpy as np

from ui.store import Vote

MIN_VOTES = 30  # fewer say nothing
MAX_NAMES = 60  # of those with most votes; the time grows with the cube of their number
RESAMPLES = 500
PRIOR = 1.0  # precision of a log strength: the information of four ties between equals
NEWTON_STEPS = 60


@dataclass(frozen=True)
class Rank:
    """One setting. Shares are from 0 to 1."""

    name: str
    score: float  # expected share of votes won against the other settings, a tie counted as half
    low: float  # 95 % interval of `score`
    high: float
    votes: int
    bad: float  # share of its votes that called both videos bad


def ranking(votes: Iterable[Vote], seed: int = 0) -> list[Rank]:
    """The settings that were voted on, best first: in the order of the lower end of their intervals.

    Ties count as half a win for each side. "Both bad" says nothing about which is better: it counts only in `bad`.
    """
    counts = Counter((vote.names, vote.winner) for vote in votes if vote.names[0] != vote.names[1])
    often = Counter(name for (pair, _), count in counts.items() for name in pair * count)
    kept = {name for name, _ in often.most_common(MAX_NAMES)}
    counts = Counter({key: count for key, count in counts.items() if kept.issuperset(key[0])})
    names = sorted({name for pair, _ in counts for name in pair})
    if not names:
        return []
    total, bad = Counter(), Counter()
    for (pair, winner), count in counts.items():
        for name in pair:
            total[name] += count
            bad[name] += count * (winner == "bad")
    scores, low, high = _scores_with_intervals(counts, names, seed)
    ranks = [
        Rank(name, *map(float, (scores[i], low[i], high[i])), total[name], bad[name] / total[name])
        for i, name in enumerate(names)
    ]
    return sorted(ranks, key=lambda rank: (-rank.low, rank.name))


@lru_cache(maxsize=1)  # it is asked for at every vote of every visitor, beside runs that are timed
def ranking_report(votes: tuple[Vote, ...]) -> dict:
    """The ranking, JSON-ready: the number of votes, how many are needed, and the rows (none below that number)."""
    rows = [asdict(rank) for rank in ranking(votes)] if len(votes) >= MIN_VOTES else []
    return {"votes": len(votes), "needed": MIN_VOTES, "ranking": rows}


def strengths(wins: np.ndarray, centre: np.ndarray | float = 0.0) -> np.ndarray:
    """Most probable log strengths (..., n) for win counts (..., n, n): wins[..., i, j] is how often i beat j.

    `centre`: that of the prior (..., n).
    """
    n = wins.shape[-1]
    games, won = wins + wins.swapaxes(-1, -2), wins.sum(-1)
    theta, eye = np.zeros(won.shape), np.eye(n)
    for _ in range(NEWTON_STEPS):
        p = win_probability(theta)
        gradient = won - (games * p).sum(-1) - PRIOR * (theta - centre)
        curvature = games * p * (1 - p)
        hessian = eye * (curvature.sum(-1) + PRIOR)[..., None] - curvature
        step = np.clip(np.linalg.solve(hessian, gradient[..., None])[..., 0], -1, 1)
        theta = theta + step
        if np.abs(step).max() < 1e-9:
            break
    return theta


def win_probability(theta: np.ndarray) -> np.ndarray:
    """Probability (..., n, n) that i beats j, from log strengths (..., n)."""
    return 1 / (1 + np.exp(theta[..., None, :] - theta[..., :, None]))


def _scores_with_intervals(counts: Counter, names: list[str], seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores (n) and the ends of their 95 % intervals. Votes are resampled with replacement."""
    keys, number = list(counts), np.array(list(counts.values()))
    place = {name: i for i, name in enumerate(names)}
    effect = np.zeros((len(keys), len(names), len(names)))  # of one vote of a kind on the wins
    for k, ((a, b), winner) in enumerate(keys):
        share = {"a": 1.0, "b": 0.0, "same": 0.5}.get(winner)
        if share is not None:
            effect[k, place[a], place[b]] += share
            effect[k, place[b], place[a]] += 1 - share
    rng = np.random.default_rng(seed)
    resampled = rng.multinomial(number.sum(), number / number.sum(), size=RESAMPLES)
    centre = rng.normal(0, PRIOR**-0.5, (RESAMPLES, len(names)))
    samples = _scores(strengths(np.tensordot(resampled, effect, axes=1), centre))
    score = _scores(strengths(np.tensordot(number, effect, axes=1)))
    return score, *np.percentile(samples, (2.5, 97.5), axis=0)


def _scores(theta: np.ndarray) -> np.ndarray:
    """Mean probability (..., n) to beat one of the others."""
    n = theta.shape[-1]
    return (win_probability(theta).sum(-1) - 0.5) / (n - 1)
