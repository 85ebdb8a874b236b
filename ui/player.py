"""Two videos under one control bar: in step to the frame, side by side, wiped or subtracted."""

from __future__ import annotations

from html import escape
from pathlib import Path

import gradio as gr
from gradio.data_classes import FileData

HERE = Path(__file__).parent


class ABPlayer(gr.HTML):
    """Value: {"a": path, "b": path, "fps", "frames", "label_a", "label_b"}; labels are escaped here."""

    def __init__(self, value: dict | None = None, **kwargs):
        texts = {f"{kind}_template": (HERE / f"player.{kind}").read_text() for kind in ("html", "css")}
        super().__init__(value, **texts, js_on_load=(HERE / "player.js").read_text(), **kwargs)

    def postprocess(self, value: dict | None) -> dict | None:
        """The value with its paths as files that the browser may fetch."""
        if not value:
            return None
        files = {pane: FileData(path=str(value[pane])).model_dump() for pane in "ab"}
        return {**value, **files, **{k: escape(value[k]) for k in ("label_a", "label_b")}}

    def preprocess(self, payload: dict | None) -> dict | None:
        return payload

    def api_info(self) -> dict:
        return {"type": "object"}
