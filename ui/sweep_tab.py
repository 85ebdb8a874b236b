"""The Sweep tab: vary one or two settings, see all results in a grid and in a plot of speed against quality."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr
from markupsafe import escape

from accel.errors import AccelError
from accel.evaluation.pareto_front import fastest_within, tuned_within
from accel.evaluation.suites import tuned
from accel.evaluation.sweep import axis_names, axis_range, parse_axis
from accel.runtime.presets import RUN_SETTINGS, Preset, load_preset, preset_names
from ui.clickable import ClickableHTML
from ui.context import Context
from ui.controls import is_usable
from ui.endpoints import add_endpoint
from ui.panels import READ_ALOUD, note
from ui.pareto import pareto_plot
from ui.run_words import preset_words
from ui.slider import ClampedSlider
from ui.sweep_api import SweepApi
from ui.sweep_grid import sweep_grid
from ui.sweep_job import Sweep, SweepState
from ui.sweep_plan import Plan, make_plan, plan_words
from ui.sweep_points import (
    MEASURED,
    PLAIN_SERIES,
    PLOTTED,
    SPEEDS,
    earlier_points,
    quality_title,
    reference_settings,
    speed_of,
    sweep_points,
)
from ui.sweep_progress import Progress

if TYPE_CHECKING:
    from accel.runtime.estimate import Estimate
    from accel.runtime.run import Run
    from ui.store import Stored

HERE = Path(__file__).parent
CANDIDATE = "the candidate of the Compare tab"
FIRST_AXIS = ("stepcache.threshold", "0.1,0.2,0.3")  # of the default preset: what is varied, and its values
PLAIN_STEPS = "10,15,20,25,30,40"
EMPTY = "Each result appears here as soon as it is measured; a click opens it in the Compare tab."
NO_PROPOSAL = "The fastest measured setting within the loss is proposed here."
NOT_WITHIN = "No measured setting loses at most {:g} of SSIM."
Update = dict[gr.blocks.Block, Any]


class SweepTab:
    """Layout and handlers; create it inside a `gr.Tab`."""

    def __init__(self, context: Context):
        self.context = context
        self.running: dict[str, Sweep] = {}  # by visitor
        self.state, self.proposed = gr.State(None), gr.State("")  # the sweep shown; see `show_proposal`
        self.opened = gr.State("")  # id of the pair that was clicked
        with gr.Row():
            self.base = gr.Dropdown(
                [CANDIDATE, *preset_names()], value=CANDIDATE, label="start from", elem_id="sweep-base", scale=2,
                info="Prompt, seed and reference are those of the Compare tab, and what a preset leaves open.",
            )  # fmt: skip
            with gr.Column(min_width=200):
                self.plain = gr.Checkbox(
                    True, label="also plain steps", elem_id="sweep-plain",
                    info="The stock pipeline in fewer steps, as a line to beat.",
                )  # fmt: skip
            self.plain_steps = gr.Textbox(
                PLAIN_STEPS, label="plain steps", elem_id="sweep-plain-steps", max_lines=1, max_length=500,
                info="Whole numbers or a range.", scale=2,
            )  # fmt: skip
        with gr.Row():
            self.axes = [
                self._add_axis("first", *FIRST_AXIS),
                self._add_axis("second", "", ""),
            ]
        with gr.Row():
            with gr.Column(min_width=260):
                self.size = gr.HTML(elem_id="sweep-size", html_template=READ_ALOUD)
            self.start = gr.Button("▶ Start", variant="primary", scale=0, min_width=110, elem_id="sweep-start")
            self.stop = gr.Button("■ Stop", scale=0, min_width=90, elem_id="sweep-stop")
        self.message = gr.HTML(note(EMPTY), elem_id="sweep-message", html_template=READ_ALOUD)
        self.step = gr.HTML(elem_id="sweep-step")  # changes too often to be read aloud
        with gr.Row(elem_id="sweep-results"):
            with gr.Column(min_width=320):
                self.grid = ClickableHTML(elem_id="sweep-grid", **_plain_html("sweep"))
            with gr.Column(min_width=320):
                self._add_plot()

    def _add_axis(self, which: str, name: str, values: str) -> tuple[gr.Dropdown, gr.Textbox]:
        """The widgets of the first or second axis: what is varied, and its values."""
        none = [] if name else [("nothing else", "")]
        knob = gr.Dropdown(
            [*none, *axis_names()], value=name, label=f"vary {which}", info=range_words(name), scale=3,
            elem_id=f"sweep-axis-{which}",
        )  # fmt: skip
        text = gr.Textbox(
            values, label=f"values of the {which}", info="As 2,4,6 or 2..6 or 0.2..0.4:0.05", max_lines=1,
            max_length=500, scale=2, elem_id=f"sweep-values-{which}",
        )  # fmt: skip
        return knob, text

    def _add_plot(self) -> None:
        self.plot = ClickableHTML(elem_id="sweep-plot", **_plain_html("pareto"))
        with gr.Row():
            self.metric = gr.Dropdown(
                [(quality_title(m), m) for m in PLOTTED], value="ssim", label="quality", min_width=200,
                elem_id="sweep-metric",
            )  # fmt: skip
            self.speed = gr.Dropdown(list(SPEEDS), value=MEASURED, label="speed", elem_id="sweep-speed", min_width=160)
            with gr.Column(min_width=200):
                self.earlier = gr.Checkbox(
                    False, label="also my earlier results", elem_id="sweep-earlier",
                    info="Of the same model, prompt and reference.",
                )  # fmt: skip
        with gr.Row():
            self.allowed = ClampedSlider(
                0,
                0.2,
                0.02,
                step=0.005,
                label="SSIM loss that I accept",
                elem_id="sweep-loss",
                buttons=[],
                min_width=180,
            )
            with gr.Column(min_width=180):
                self.proposal = gr.HTML(elem_id="sweep-proposal", html_template=READ_ALOUD)
                self.use = gr.Button("Use it", interactive=False, size="sm", elem_id="sweep-use")

    def wire(self, page) -> None:
        """Connect the events; `page` has the model, the visitor and the Compare tab."""
        self.page = page
        quick = {"api_visibility": "private", "show_progress": "hidden", "queue": False}
        own = [self.base, self.plain, self.plain_steps, *(widget for axis in self.axes for widget in axis)]
        inputs = [page.model, *own, *page.compare.setting_components]
        views = [self.state, self.metric, self.speed, self.earlier, self.allowed, page.visitor]
        self.start.click(
            self.run_sweep, [self.metric, self.speed, self.earlier, self.allowed, page.visitor, *inputs],
            self.outputs, api_visibility="private", show_progress="hidden", concurrency_limit=None,
        )  # fmt: skip
        self.stop.click(self.stop_sweep, page.visitor, self.message, **quick)
        edited = [page.tabs.select, *(widget.change for widget in own)]
        gr.on(edited, self.show_size, inputs, self.size, trigger_mode="always_last", **quick)
        first, values = self.axes[0]
        moved = page.model.change(self.move_axis, [first, page.model], [first, values], **quick)
        for event in (moved, page.compare.switched):  # then the widgets are the new model's
            event.then(self.show_size, inputs, self.size, **quick)
        for knob, _ in self.axes:
            knob.input(lambda name: gr.update(info=range_words(name)), knob, knob, **quick)
        gr.on([self.metric.change, self.speed.change, self.earlier.change], self.show_plot, views, self.plot, **quick)
        choices = [self.metric, self.speed, self.earlier, self.allowed]
        gr.on([choice.change for choice in choices], self.remember_choices, [page.visitor, *choices], None, **quick)
        gr.on(
            [page.tabs.select, page.model.change, self.allowed.change, self.speed.change], self.show_proposal,
            [self.state, self.speed, self.allowed, page.model], [self.proposal, self.proposed, self.use], **quick,
        )  # fmt: skip
        opening = {"inputs": self.opened, "outputs": page.compare.outputs, "api_visibility": "private"}
        for clickable in (self.grid, self.plot):
            clicked = clickable.click(clicked_id, None, self.opened, **quick)
            page.compare.follow(clicked.then(page.compare.show_stored, **opening))
        proposed = [self.proposed, page.model]
        page.compare.follow(self.use.click(self.use_proposal, proposed, page.compare.outputs, api_visibility="private"))

    def add_endpoints(self) -> None:
        """Register the endpoint for programs; call it inside the page's `gr.Blocks`."""
        add_endpoint(SweepApi(self.context).sweep)

    @property
    def outputs(self) -> list[gr.blocks.Block]:
        """Everything that a running sweep changes."""
        return [
            self.state,
            self.message,
            self.step,
            self.grid,
            self.plot,
            self.start,
            self.stop,
            self.proposal,
            self.proposed,
            self.use,
        ]

    # The size before the start

    def plan(self, model: str, values: list[Any]) -> Plan:
        """The sweep that the widgets describe. Raises AccelError for the first thing that is not possible."""
        base, plain, plain_steps, name, text, second, second_text = values[:7]
        pair = self.page.compare.settings(model, values[7:])
        side = pair.candidate if base == CANDIDATE else {**pair.candidate, **preset_settings(base)}
        axes = [parse_axis(*axis) for axis in ((name, text), (second, second_text)) if axis[0]]
        return make_plan(pair.run, pair.reference, side, axes, plain_steps if plain else "")

    def move_axis(self, name: str, model: str):
        """The first axis and its values; those that the page begins with if the model lacks the method varied."""
        method, _, parameter = name.partition(".")
        if not parameter or is_usable(method, model):
            return gr.skip(), gr.skip()
        name, values = FIRST_AXIS
        return gr.update(value=name, info=range_words(name)), values

    def show_size(self, model: str, *values) -> str:
        """How many results the sweep has and what it takes, or why it is not possible."""
        try:
            return note(plan_words(self.plan(model, list(values)), self._estimate(model)))
        except AccelError as error:
            return note(str(error), bad=True)

    def _estimate(self, model: str) -> Callable[[Run], Estimate] | None:
        """What a run will take; None before the model is loaded."""
        loaded = self.context.workers.pipeline(model)
        if loaded is None:
            return None
        from accel.runtime.estimate import estimate  # needs torch, which is imported by now

        return lambda run: estimate(run, loaded[0], self.context.workers.step_seconds, self.context.workers.work)

    # Running

    def run_sweep(
        self, metric: str, speed: str, earlier: bool, allowed: float, visitor: str, model: str, *values
    ) -> Iterator[Update]:
        """Run the sweep that the widgets describe, and show each result as it comes."""
        if visitor in self.running:
            yield self._refused("a sweep of yours is running already: stop it first")
            return
        try:
            sweep = Sweep(self.context, visitor, self.plan(model, list(values)))
        except AccelError as error:
            yield self._refused(str(error))
            return
        self.running[visitor], sweep.choices = sweep, (metric, speed, earlier, allowed)
        state = sweep.state
        texts = Progress(state)
        try:
            yield {**self._views(sweep, running=0), **self._buttons(True), self.message: note(texts.result())}
            for kind, data in sweep.events():
                if kind == "waiting":
                    yield {self.step: texts.waiting(**data)}
                elif kind == "step":
                    yield {self.step: texts.step(**data)}
                elif kind == "result":
                    yield {**self._views(sweep, running=state.ended), self.message: note(texts.result())}
                elif kind == "ended":
                    ended = {self.message: texts.ended(**data), self.step: ""}
                    yield {self.grid: sweep_grid(state), **self._buttons(False), **ended}
        finally:
            self.running.pop(visitor, None)

    def remember_choices(self, visitor: str, *choices) -> None:
        """What a running sweep of the visitor shows from the next result on."""
        if sweep := self.running.get(visitor):
            sweep.choices = choices

    def stop_sweep(self, visitor: str):
        """Stop the visitor's sweep after the current step; what is measured stays."""
        sweep = self.running.get(visitor)
        if sweep is None:
            return note("No sweep is running.")
        sweep.stop()
        return note("Stopping after this step…")

    def _refused(self, reason: str) -> Update:
        gr.Warning(str(escape(reason)))
        return {self.message: note(reason, bad=True)}

    def _buttons(self, running: bool) -> Update:
        return {self.start: gr.update(interactive=not running),
                self.stop: gr.update(variant="stop" if running else "secondary")}  # fmt: skip

    def _views(self, sweep: Sweep, running: int | None) -> Update:
        state, (metric, speed, earlier, allowed) = sweep.state, sweep.choices
        proposal = zip(
            [self.proposal, self.proposed, self.use],
            self.show_proposal(state, speed, allowed, state.plan.common["model"]),
        )
        plot = self.show_plot(state, metric, speed, earlier, allowed, sweep.visitor)
        return {self.state: state, self.grid: sweep_grid(state, running), self.plot: plot, **dict(proposal)}

    # The plot and the proposal

    def show_plot(self, state: SweepState | None, metric: str, speed: str, earlier: bool, allowed: float, visitor: str):
        """The plot of a sweep and, if asked for, of the visitor's other pairs with its reference."""
        points = sweep_points(state, metric, speed) if state else []
        if earlier and state:
            points += earlier_points(self._earlier(state, visitor), metric, speed)
        return pareto_plot(points, SPEEDS[speed], quality_title(metric), frozenset({PLAIN_SERIES}))

    def _earlier(self, state: SweepState, visitor: str) -> list[Stored]:
        """The visitor's pairs outside a sweep that have its reference, of any seed: others are not comparable."""
        own = next(filter(None, (self.context.store.find(result.run_id) for result in state.done)), None)
        if own is None:
            return []
        reference, pairs = reference_settings(own), self.context.store.list(visitor, limit=-1)
        return [pair for pair in pairs if pair.group != state.id and reference_settings(pair) == reference]

    def show_proposal(self, state: SweepState | None, speed: str, allowed: float, model: str):
        """The fastest setting within a loss, in a sentence; what it is; whether it can be used.

        It is the id of a result of the sweep, by measured speed or by work; without one of this model it is a preset,
        as {"methods": ...}, of what `accel tune` found for it.
        """
        done = state.done if state and state.plan.common["model"] == model else []
        if not done:
            return _tuned_proposal(model, allowed)
        best = fastest_within([{**result.row, "speedup": speed_of(result.row, speed)} for result in done], allowed)
        if best is None:
            return note(NOT_WITHIN.format(allowed)), "", gr.update(interactive=False)
        row = done[best].row
        measured = f"{row['speedup']:.2f}× as fast with {row['work']:.0%} of the work, SSIM {row['ssim']:.4f}"
        text = f"{row['label']}: {measured}. No faster setting is within the loss."
        return note(text), done[best].run_id, gr.update(interactive=True)

    def use_proposal(self, proposed: str | dict[str, Any], model: str) -> Update:
        """What is proposed, in the Compare tab: a result with its settings, or a preset's settings alone."""
        compare = self.page.compare
        if isinstance(proposed, str):
            return compare.show_stored(proposed)
        return {
            self.page.tabs: gr.Tabs(selected="compare"), **compare.load_settings(Preset(**proposed), {}, model),
            compare.message: note("The setting is chosen. Press Run to generate with it."),
        }  # fmt: skip


def _tuned_proposal(model: str, allowed: float):
    """What `show_proposal` gives for the search that was made for the model, if one was."""
    search = tuned(model)
    row = search and tuned_within(search["rows"], allowed)
    if not row:
        return note(NOT_WITHIN.format(allowed) if search else NO_PROPOSAL), "", gr.update(interactive=False)
    gain = f"{1 / row['work']:.2f}× less work, SSIM {row['ssim']:.4f}"
    text = (
        f"{preset_words(row['preset'])}: {gain}. Of all that was tried on {len(search['prompts'])} other prompts, no "
        "faster setting loses so little and keeps what the prompt says."
    )
    return note(text), row["preset"], gr.update(interactive=True)


def range_words(name: str) -> str:
    """What an axis takes, for the line below its name."""
    return axis_range(name).capitalize() + "." if name else "One axis is enough."


def preset_settings(name: str) -> dict:
    """The settings that a preset has. Raises AccelError for a text that is no preset's name."""
    if name not in preset_names():
        raise AccelError(f"no preset {name!r}; there are {', '.join(preset_names())}")
    preset = load_preset(name)
    return {"methods": preset.methods, **preset.model_dump(include=set(RUN_SETTINGS), exclude_none=True)}


def _plain_html(name: str) -> dict[str, Any]:
    """Arguments of a `gr.HTML` with a style sheet of its own in place of Gradio's text style."""
    return {"css_template": (HERE / f"{name}.css").read_text(), "apply_default_css": False}


def clicked_id(event: gr.EventData) -> str:
    """The id of the element that was clicked."""
    return event._data["id"]
