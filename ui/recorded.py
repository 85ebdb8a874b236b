"""Recorded pairs from `examples/runs`: the page shows one before anything is computed."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

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
    "balanced": Recording("checked navy background: the crimson disc is huge and slides to the left gently", 2),
    "quick": Recording("dotted jungle background: the orange cross is big and contracts gently", 9),
    "stepcache": Recording("a big violet hoop fast grows on a striped navy background", 5),
    "combined": Recording("a huge yellow triangle falls gently over a brown background with dots", 4),
    "fastercache": Recording("a big purple cross moves down slowly over a striped brown background", 2),
    "asymrnr": Recording("a huge yellow circle spins slowly over a dotted navy background", 3),
    "meanflow": Recording("a small orange ring grows slowly over a plain black background", 4),
    "disca": Recording("on a gray background with stripes, a large purple cross falls gently", 1),
    "gpd": Recording("on a plain white background, a small blue square moves right quickly", 6),
    "turbo": Recording("a big crimson triangle gently climbs on a coal background with stripes", 6),
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
    measured = f"measured {report['measured']} on {report['device']}, {report['threads']} threads"
    banner = f"Recorded pair: “{report['prompt']}”, {measured}. Press Run for a live one."
    return Recorded(folder.name, folder, pair_value(report, f"recorded/{folder.name}", labels), report, banner)
