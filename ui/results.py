"""The output half of the page: its components, and what they show after each event of a job."""

from __future__ import annotations

from typing import Any

import gradio as gr
from markupsafe import escape

from ui.panels import EMPTY_PANE, READ_ALOUD, metric_cards, note, pane, waiting_pane
from ui.player import Player
from ui.recorded import recorded_pairs
from ui.snippet import snippet
from ui.timeline import timeline
from ui.token_maps import token_maps

Update = dict[gr.components.Component, Any]


class Results:
    """Message, live panes, players, metric cards, timeline, token maps and code; create it inside a `gr.Blocks`."""

    def __init__(self):
        """Create the components; they show the first recorded pair if there is one."""
        recorded = next(iter(recorded_pairs()), None)
        cards, steps, maps, code = _views(recorded.report) if recorded else [""] * 4
        self.message = gr.HTML(note(recorded.banner) if recorded else "", elem_id="message", html_template=READ_ALOUD)
        with gr.Row():
            self.panes = {which: gr.HTML(EMPTY_PANE, elem_id=f"live-{which}") for which in "ab"}
        self.player = Player(recorded.player if recorded else None, elem_id="player")
        self.same_steps_player = Player(visible=False, elem_id="same-steps-player")
        self.views = [
            gr.HTML(cards, elem_id="metric-cards"), gr.HTML(steps, elem_id="timeline"),
            gr.HTML(maps, elem_id="token-maps"),
            gr.Code(code, language="python", label="This setting in your own code", interactive=False, elem_id="code"),
        ]  # fmt: skip

    @property
    def components(self) -> list[gr.components.Component]:
        """All components that an event can change."""
        return [self.message, *self.panes.values(), self.player, self.same_steps_player, *self.views]

    def update(self, kind: str, data: dict) -> Update:
        """New values of the components that an event of a job changes; empty if it changes none."""
        handler = getattr(self, f"on_{kind}", None)
        return handler(**data) if handler else {}

    def on_waiting(self, ahead: int, loading: bool, seconds: float | None) -> Update:
        """The model is loading, or `ahead` other jobs run first."""
        text = "Loading the model…" if loading else f"Waiting: {ahead} run{'s' * (ahead > 1)} ahead of you."
        return {self.message: note(text)}

    def on_started(self, message: str, cached: bool) -> Update:
        """The job has started; `cached`: its baseline need not be generated."""
        baseline = waiting_pane("baseline", "cached" if cached else "next")
        accelerated = waiting_pane("accelerated", "after the baseline")
        return {self.message: note(message), self.panes["a"]: baseline, self.panes["b"]: accelerated}

    def on_step(self, which: str, pane_values: dict) -> Update:
        """One pane has a new preview."""
        return {self.panes[which]: pane(**pane_values)}

    def on_pair(self, report: dict, player: dict, message: str) -> Update:
        """Both videos are there."""
        views = dict(zip(self.views, _views(report)))
        hidden = {self.same_steps_player: gr.update(visible=False)}
        return {self.message: note(message), **self._empty_panes(), self.player: player, **hidden, **views}

    def on_same_steps_baseline(self, player: dict) -> Update:
        """The baseline at the accelerated run's step count is there."""
        return {**self._empty_panes(), self.same_steps_player: gr.update(value=player, visible=True)}

    def on_stopping(self) -> Update:
        """The visitor has asked to stop; the current step is not finished."""
        return {self.message: note("Stopping after this step…")}

    def on_stopped(self) -> Update:
        """The job ended because its visitor asked for it."""
        return {self.message: note("Stopped. The last pair is still here."), **self._empty_panes()}

    def on_refused(self, reason: str) -> Update:
        """The job cannot run; the reason is one sentence for the visitor."""
        gr.Warning(str(escape(reason)))
        return {self.message: note(reason, bad=True), **self._empty_panes()}

    def on_failed(self, error_id: str) -> Update:
        """The job raised an unexpected error; the server's log has it under its id."""
        return self.on_refused(f"An unexpected error occurred. The server's log has it as error {error_id}.")

    def _empty_panes(self) -> Update:
        return {pane: EMPTY_PANE for pane in self.panes.values()}


def _views(report: dict) -> list[str]:
    """What the metric cards, timeline, token maps and code show for a report."""
    return [metric_cards(report), timeline(report["trace"]), token_maps(report["trace"]), snippet(report)]
