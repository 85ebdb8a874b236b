"""Recorded pairs from `examples/runs`: they play before anything is computed, and say so."""

from __future__ import annotations

import json
from dataclasses import dataclass
from html import escape
from pathlib import Path

from accel.runtime.paths import ROOT


@dataclass(frozen=True)
class Recorded:
    """A recorded pair: the player's value, its report, and the ribbon that says what it is."""

    value: dict
    report: dict
    banner: str


def recorded_pairs(folder: Path = ROOT / "examples" / "runs") -> list[Recorded]:
    """All recorded pairs, in the order of their names."""
    return [_read(file) for file in sorted(folder.glob("*/run.json"))]


def _read(file: Path) -> Recorded:
    report, home = json.loads(file.read_text()), file.parent
    report = {"measured": "earlier", **report}
    value = {
        "a": str(home / "a.mp4"), "b": str(home / "b.mp4"), "fps": report.get("fps", 8), "frames": report["frames"],
        "label_a": f"baseline, {report['steps_a']} steps (recorded)",
        "label_b": f"{', '.join(report['methods'])}, {report['steps']} steps (recorded)",
    }  # fmt: skip
    measured = f"measured {report['measured']} on {report['device']}, {report['threads']} threads"
    text = f"Recorded pair: “{escape(report['prompt'])}”, {escape(measured)}. Press Run for a live one."
    banner = f'<div class="note">{text}</div>'
    return Recorded(value, report, banner)
