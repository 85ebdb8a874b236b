"""Two videos under one control bar, synchronous to the frame: side by side, as a wipe, or as their difference."""

from __future__ import annotations

from pathlib import Path

import gradio as gr
from gradio.data_classes import FileData
from markupsafe import escape

HERE = Path(__file__).parent


class ABPlayer(gr.HTML):
    """Value: {"a": path, "b": path, "fps", "frames", "label_a", "label_b"}.

    The labels are escaped here, because the browser fills `player.html` without escaping.
    """

    def __init__(self, value: dict | None = None, **kwargs):
        templates = {f"{kind}_template": (HERE / f"player.{kind}").read_text() for kind in ("html", "css")}
        super().__init__(value, **templates, js_on_load=(HERE / "player.js").read_text(), **kwargs)

    def postprocess(self, value: dict | None) -> dict | None:
        """The value with escaped labels and with its paths as files that the browser may fetch."""
        if not value:
            return None
        files = {pane: FileData(path=str(value[pane])).model_dump() for pane in "ab"}
        return {**value, **files, **{key: str(escape(value[key])) for key in ("label_a", "label_b")}}

    def preprocess(self, payload: dict | None) -> dict | None:
        """The browser's value, unchanged."""
        return payload

    def api_info(self) -> dict:
        """Type of the value in the API."""
        return {"type": "object"}
