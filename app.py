"""The page: see what each acceleration method does to a video, and what it costs.

python app.py [--host H] [--port P] [--share] [--model DIR_OR_ID]
"""

from __future__ import annotations

import os
import uuid
from pathlib import Path

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
os.environ.setdefault("GRADIO_SSR_MODE", "false")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that wait actively slow each other on a busy machine

import ui.quick_gradio  # noqa: F401, I001  before Gradio
import ui.zero_gpu  # noqa: F401  before torch
import gradio as gr

from accel.runtime.cpu_quota import limit_threads
from ui import server
from ui.api import add_endpoints
from ui.code_tab import CodeTab
from ui.compare_tab import CompareTab
from ui.context import Context
from ui.history_tab import HistoryTab
from ui.results_tab import ResultsTab
from ui.sweep_tab import SweepTab
from ui.vote_tab import VoteTab

TABS = {"compare": CompareTab, "sweep": SweepTab, "history": HistoryTab, "vote": VoteTab, "results": ResultsTab,
        "code": CodeTab}  # fmt: skip
TITLE = """<h1 id="title">Same noise, twice <small>What does each acceleration method do to a video, and at what
cost?</small></h1>"""


class Page:
    """Layout and wiring of the tabs, each of which is an attribute; knows no method by name."""

    css = (Path(__file__).parent / "ui" / "page.css").read_text()

    def __init__(self, context: Context):
        self.context = context

    def build(self) -> gr.Blocks:
        """The page as Gradio Blocks; nothing is computed until a visitor presses Run."""
        with gr.Blocks(title="accel: video diffusion, side by side", analytics_enabled=False) as demo:
            self.visitor = gr.BrowserState("", storage_key="accel-visitor", secret=self.context.store.secret())
            with gr.Row(elem_id="header"):
                gr.HTML(TITLE)
                models = [(choice.label, choice.id) for choice in self.context.models]
                self.model = gr.Dropdown(models, value=self.context.model, label="model", elem_id="model", scale=0,
                                         min_width=260, container=False)  # fmt: skip
            with gr.Tabs(selected="compare", elem_id="tabs") as self.tabs:
                for name, tab in TABS.items():
                    with gr.Tab(name.capitalize(), id=name):
                        setattr(self, name, tab(self.context))
            for name in TABS:
                getattr(self, name).wire(self)
            demo.load(self.greet, self.visitor, [self.visitor, *self.compare.outputs, *self.code.views], queue=False,
                      show_progress="hidden", api_visibility="private")  # fmt: skip
            add_endpoints(self.context, self)
        return demo

    def greet(self, request: gr.Request, visitor: str) -> dict:
        """A new visitor gets a random id; settings in the URL go into the widgets."""
        new = {} if visitor else {self.visitor: uuid.uuid4().hex}
        return {**new, **self.code.settings_of_url(request)}

    @staticmethod
    def theme() -> gr.Theme:
        """Gradio's plain theme with the browser's own fonts, so that nothing is fetched from elsewhere."""
        return gr.themes.Base(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"],
                              radius_size="md", spacing_size="sm")  # fmt: skip

    def routes(self) -> list:
        """Routes of the tabs' own files."""
        return [*self.vote.routes(), *self.code.routes()]


def main() -> None:
    """Serve the page until it is interrupted."""
    limit_threads()
    server.serve(Page, server.parse_arguments())


if __name__ == "__main__":
    main()
