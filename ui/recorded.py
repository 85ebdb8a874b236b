"""Recorded pairs from `examples/runs`: the page shows one before anything is computed."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from accel.runtime.paths import ROOT


@dataclass(frozen=True)
class Recorded:
    """A recorded pair: the player's value, its report, and the banner that says that it is recorded."""

    player: dict
    report: dict
    banner: str


def recorded_pairs(folder: Path = ROOT / "examples" / "runs") -> list[Recorded]:
    """All recorded pairs, in the order of their names."""
    return [_read(file) for file in sorted(folder.glob("*/run.json"))]


def _read(file: Path) -> Recorded:
    report = {"measured": "earlier", **json.loads(file.read_text())}
    player = {
        "a": str(file.parent / "a.mp4"), "b": str(file.parent / "b.mp4"),
        "fps": report.get("fps", 8), "frames": report["frames"],
        "label_a": f"baseline, {report['steps_a']} steps (recorded)",
        "label_b": f"{', '.join(report['methods'])}, {report['steps']} steps (recorded)",
    }  # fmt: skip
    measured = f"measured {report['measured']} on {report['device']}, {report['threads']} threads"
    return Recorded(player, report, f"Recorded pair: “{report['prompt']}”, {measured}. Press Run for a live one.")
