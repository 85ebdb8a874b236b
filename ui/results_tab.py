"""The Results tab: the committed benchmark results. They are read when the tab is opened."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from accel.evaluation.metrics import METRICS
from accel.evaluation.suites import SUITES
from ui.clickable import ClickableHTML
from ui.context import Context
from ui.measured import ALL, Order, about, differences, has_metric, plot, read, suite_names, table
from ui.panels import note
from ui.templating import render

Update = dict[gr.components.Component, Any]

HERE = Path(__file__).parent
LABEL = "Results"  # of the tab
QUALITY = ("ssim", "psnr", "adherence")  # metrics that the plot can show
NOT_HERE = (
    "The measured results are not part of this installation: they are in the folder docs/results of the repository, "
    "and `python -m accel bench --suite NAME` measures them again."
)


class ResultsTab:
    """A suite's table, plot and differences; create it inside a `gr.Tab`, then `wire` it."""

    def __init__(self, context: Context):
        """Create the components. They stay empty until the tab is opened, as the results are read only then."""
        found = suite_names()
        choices = [(name if name in (ALL, *SUITES) else f"{name}: times on a GPU", name) for name in found]
        self.suite = gr.Dropdown(choices, value=found[0] if found else None, label="what was measured", elem_id="suite",
                                 visible=bool(found))  # fmt: skip
        self.order = gr.State(Order())
        self.about = gr.HTML(note("Loading…") if found else note(NOT_HERE), elem_id="results-about")
        self.table = ClickableHTML(elem_id="results-table", **_css("results_tab"))
        self.metric = gr.Radio([(METRICS[m].title, m) for m in QUALITY], value=QUALITY[0], label="quality in the plot",
                               elem_id="results-metric", visible=False)  # fmt: skip
        self.plot = gr.HTML(elem_id="results-plot", **_css("pareto"))
        self.pairs = gr.HTML(elem_id="results-pairs", **_css("results_tab"))

    @property
    def outputs(self) -> list[gr.components.Component]:
        """Everything that another suite changes."""
        return [self.order, self.about, self.table, self.metric, self.plot, self.pairs]

    def wire(self, page) -> None:
        """Connect the events; the tab's first opening reads the results."""
        quick = {"api_visibility": "private", "queue": False, "show_progress": "hidden"}
        page.tabs.select(self.open, [self.suite, self.metric], self.outputs, **quick)
        self.suite.input(self.show, [self.suite, self.metric], self.outputs, **quick)
        self.metric.input(self.show_plot, [self.suite, self.metric], self.plot, **quick)
        self.table.click(self.sort, [self.suite, self.order], [self.order, self.table], **quick)

    def open(self, suite: str | None, metric: str, event: gr.SelectData) -> Update:
        """The chosen suite if it is this tab that was opened."""
        return self.show(suite, metric) if event.value == LABEL and suite else {self.order: gr.skip()}

    def show(self, suite: str, metric: str) -> Update:
        """A suite as it was measured."""
        found = read(suite)
        has_quality = has_metric(found, QUALITY[0])
        return {
            self.order: Order(), self.about: render("results_about", lines=about(suite, found)),
            self.table: table(found, Order()), self.metric: gr.update(visible=has_quality),
            self.plot: self.show_plot(suite, metric), self.pairs: differences(found),
        }  # fmt: skip

    def show_plot(self, suite: str, metric: str) -> str:
        """Speed against a metric."""
        return plot(read(suite), metric if metric in QUALITY else QUALITY[0])

    def sort(self, suite: str, order: Order, event: gr.EventData) -> Update:
        """The table by the column whose heading was pressed: best first, then the other way round."""
        column = int(event._data["id"])
        order = Order(column, not order[1] if order[0] == column else column > 0)
        return {self.order: order, self.table: table(read(suite), order)}


def _css(name: str) -> dict[str, Any]:
    """Arguments of a `gr.HTML` that uses the style sheet `ui/NAME.css`."""
    return {"css_template": (HERE / f"{name}.css").read_text(), "apply_default_css": False}
