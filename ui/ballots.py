"""Blind pairs: which videos a visitor can vote on, and addresses that do not tell which is which."""

from __future__ import annotations

import random
import secrets
import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from accel.errors import AccelError
from ui.recorded import recorded_pairs
from ui.store import Store, Winner

MAX_BALLOTS = 2000  # open at once; the oldest are closed
Choice = Literal["left", "right", "same", "bad"]
CHOICES = ("left", "right", "same", "bad")


@dataclass(frozen=True)
class Ballot:
    """A pair that is shown to a visitor. `swapped`: its candidate b is on the left."""

    token: str
    pair: str  # id of the stored pair, or recorded/NAME
    folder: Path
    report: dict
    swapped: bool

    @property
    def sides(self) -> dict[str, str]:
        """Which of a and b is on the left and on the right."""
        return {"left": "b", "right": "a"} if self.swapped else {"left": "a", "right": "b"}

    def winner(self, choice: Choice) -> Winner:
        """A choice in terms of the pair. Raises AccelError for what is not one of `CHOICES`."""
        if choice not in CHOICES:
            raise AccelError(f"a vote is one of {', '.join(CHOICES)}, not {str(choice)[:40]!r}")
        return self.sides.get(choice, choice)


class Ballots:
    """Opens ballots and finds them by their token; thread-safe."""

    def __init__(self, store: Store, rng: random.Random | None = None):
        """`rng` chooses the pairs and the sides; without it nobody can foresee them."""
        self._store, self._rng = store, rng or random.SystemRandom()
        self._open: OrderedDict[str, Ballot] = OrderedDict()
        self._lock = threading.Lock()

    def open(self, visitor: str) -> Ballot | None:
        """A pair that the visitor has not voted on, with shuffled sides; None if there is none."""
        visitor = visitor or ""  # the store would take None as the owner of everything
        voted = self._store.voted(visitor)
        pairs = [pair for pair in self._pairs(visitor) if pair[0] not in voted]
        if not pairs:
            return None
        token, swapped = secrets.token_hex(16), self._rng.random() < 0.5
        name, folder, report = self._rng.choice(pairs)
        kept = {key: value for key, value in report.items() if key != "trace"}  # which is nearly all of its size
        ballot = Ballot(token, name, folder, kept, swapped)
        with self._lock:
            self._open[token] = ballot
            while len(self._open) > MAX_BALLOTS:
                self._open.popitem(last=False)
        return ballot

    def find(self, token: str) -> Ballot | None:
        """The ballot of a token; None if it was never opened or is closed."""
        return self._open.get(str(token))

    def file_of(self, token: str, side: str) -> Path | None:
        """The video on a side ("left" or "right") of a ballot; None if there is none."""
        ballot = self.find(token)
        if ballot is None or side not in ballot.sides:
            return None
        file = ballot.folder / f"{ballot.sides[side]}.mp4"
        return file if file.is_file() else None

    def _pairs(self, visitor: str) -> list[tuple[str, Path, dict]]:
        """(id, folder, report) of the recorded pairs and the visitor's own, without those of equal videos."""
        pairs = [(f"recorded/{pair.name}", pair.folder, pair.report) for pair in recorded_pairs()]
        pairs += [(pair.id, pair.folder, pair.report) for pair in self._store.list(visitor, limit=-1)]
        return [pair for pair in pairs if not pair[2].get("bit_equal")]
