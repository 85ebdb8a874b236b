"""Ranks settings from blind votes: a Bradley-Terry model with bootstrap intervals."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass

import numpy as np

from ui.store import Vote

MIN_VOTES = 30  # fewer say nothing
RESAMPLES = 500
RIDGE = 0.02  # keeps the strength of a setting finite that has won, or lost, every vote
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
    """The settings that were voted on, best first.

    Ties count as half a win for each side. "Both bad" says nothing about which is better: it counts only in `bad`.
    """
    counts = Counter((vote.names, vote.winner) for vote in votes if vote.names[0] != vote.names[1])
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
    return sorted(ranks, key=lambda rank: (-rank.score, rank.name))


def ranking_report(votes: list[Vote]) -> dict:
    """The ranking, JSON-ready: the number of votes, how many are needed, and the rows (none below that number)."""
    rows = [asdict(rank) for rank in ranking(votes)] if len(votes) >= MIN_VOTES else []
    return {"votes": len(votes), "needed": MIN_VOTES, "ranking": rows}


def strengths(wins: np.ndarray) -> np.ndarray:
    """Bradley-Terry log strengths (..., n) of win counts (..., n, n): wins[..., i, j] is how often i beat j.

    Their mean is 0. A small ridge penalty makes the maximum of the likelihood unique.
    """
    n = wins.shape[-1]
    games, won = wins + wins.swapaxes(-1, -2), wins.sum(-1)
    theta, eye = np.zeros(won.shape), np.eye(n)
    for _ in range(NEWTON_STEPS):
        p = win_probability(theta)
        gradient = won - (games * p).sum(-1) - RIDGE * theta
        curvature = games * p * (1 - p)
        hessian = eye * (curvature.sum(-1) + RIDGE)[..., None] - curvature
        step = np.clip(np.linalg.solve(hessian, gradient[..., None])[..., 0], -1, 1)
        theta = theta + step
        if np.abs(step).max() < 1e-9:
            break
    return theta - theta.mean(-1, keepdims=True)


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
    resampled = np.random.default_rng(seed).multinomial(number.sum(), number / number.sum(), size=RESAMPLES)
    wins = np.tensordot(np.concatenate([number[None], resampled]), effect, axes=1)
    scores = _scores(strengths(wins))
    return scores[0], *np.percentile(scores[1:], (2.5, 97.5), axis=0)


def _scores(theta: np.ndarray) -> np.ndarray:
    """Mean probability (..., n) to beat one of the others."""
    n = theta.shape[-1]
    return (win_probability(theta).sum(-1) - 0.5) / (n - 1)
