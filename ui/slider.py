"""A slider that agrees with the browser about a number that was typed."""

from __future__ import annotations

import gradio as gr


class ClampedSlider(gr.Slider):
    """A slider whose handlers get the nearest end for a number out of range, and the lower end for an empty box.

    The browser shows the same when the box is left. Gradio's own would refuse the event, and an event outside of the
    queue is refused without a word.
    """

    is_template = True  # the browser's part is that of `gr.Slider`

    def preprocess(self, payload: float | None) -> float:
        return super().preprocess(self.minimum if payload is None else min(max(payload, self.minimum), self.maximum))
