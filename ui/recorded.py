"""Recorded pairs from `examples/runs`: the page shows one before anything is computed."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

from accel.errors import amount
from accel.runtime.paths import ROOT
from ui.player import pair_value

RUNS = ROOT / "examples" / "runs"


class Recording(NamedTuple):
    """What `docs/record_pairs.py` records under the name of a preset: a prompt held out of training, and a seed.

    The reference shows what the prompt says; how the candidate looks was not known when it was chosen.
    """

    prompt: str
    seed: int


RECORDINGS = {  # by preset, in the order in which the page offers them
    "stepcache": Recording("a big crimson star gently contracts on a forest background with grass", 5),
    "balanced": Recording("a large cyan disc rises slowly over a cloudy navy background", 2),
    "quick": Recording("a large golden ring slowly drifts left on a jungle background with ripples", 9),
    "combined": Recording("on a black background with clouds, a large blue disc drifts left gently", 4),
    "fastercache": Recording("a big blue star contracts slowly over a white background with veins", 2),
    "asymrnr": Recording("night background with veins: the red triangle is huge and moves up slowly", 3),
    "meanflow": Recording("a big orange circle quickly falls on a cloudy forest background", 4),
    "disca": Recording("a big yellow disc spins gently over a marbled earth background", 1),
    "gpd": Recording("a huge violet disc fast shrinks on a navy background with stars", 6),
    "turbo": Recording("night background with stripes: the purple plus is big and falls slowly", 6),
}


@dataclass(frozen=True)
class Recorded:
    """A recorded pair: its name, its folder, the player's value, its report, and a banner that says it is recorded."""

    name: str
    folder: Path
    player: dict
    report: dict
    banner: str


@cache
def recorded_pairs(folder: Path = RUNS) -> tuple[Recorded, ...]:
    """All recorded pairs: those of `RECORDINGS` in their order, then others by name. They are read once."""
    names = sorted(file.parent.name for file in folder.glob("*/run.json"))
    first = [name for name in RECORDINGS if name in names]
    return tuple(_read(folder / name) for name in (*first, *(name for name in names if name not in first)))


def _read(folder: Path) -> Recorded:
    report = {"measured": "earlier", "fps": 8, **json.loads((folder / "run.json").read_text())}
    labels = (
        f"baseline, {report['steps_a']} steps (recorded)",
        f"{', '.join(report['methods'])}, {report['steps']} steps (recorded)",
    )
    measured = f"measured {report['measured']} on {report['device']}, {amount(report['threads'], 'thread')}"
    banner = f"Recorded pair: “{report['prompt']}”, {measured}. Press Run for a live one."
    return Recorded(folder.name, folder, pair_value(report, f"recorded/{folder.name}", labels), report, banner)
