"""The player: two to four videos under one clock, side by side, as a wipe, flicker, difference, overlay or race."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import gradio as gr

HERE = Path(__file__).parent


class Player(gr.HTML):
    """Shows a value like that of `pair_value`; None hides the player.

    `value["panes"]` has the reference first and up to three candidates. `player.js` shows every string of the value as
    text, never as HTML, and keeps the visitor's settings when the value changes.
    """

    def __init__(self, value: dict | None = None, **kwargs):
        templates = {f"{kind}_template": (HERE / f"player.{kind}").read_text() for kind in ("html", "css")}
        script = (HERE / "player.js").read_text()
        super().__init__(value, **templates, js_on_load=script, apply_default_css=False, **kwargs)

    def api_info(self) -> dict:
        """Type of the value in the API."""
        return {"type": "object"}


def pane_value(label: str, video: str, sprite: str | None = None, race: dict | None = None) -> dict:
    """One pane: its label, the URL of its mp4, and its race if it has one, with the URL of the previews."""
    return {"label": label, "video": video, "race": {"sprite": sprite, **race} if race else None}


def pair_value(report: dict, folder: str, labels: Sequence[str], mode: str | None = None) -> dict:
    """The player's value for the pair of a report, whose files a.mp4, b.mp4, a.jpg, b.jpg are below the URL `folder`.

    `mode`: the view to change to ("side", "wipe", "flicker", "difference", "over", "race"); default: the visitor's.
    """
    races = report.get("race") or {}
    panes = [
        pane_value(label, f"{folder}/{side}.mp4", f"{folder}/{side}.jpg", races.get(side))
        for side, label in zip("ab", labels)
    ]
    ssim = report.get("ssim_frames")
    value = {
        "panes": panes, "fps": report["fps"], "frames": report["frames"],
        "height": report["height"], "width": report["width"],
        "curves": [{"pane": 1, "name": "SSIM", "values": [float(v) for v in ssim]}] if ssim else [],
    }  # fmt: skip
    return value if mode is None else {**value, "mode": mode}
