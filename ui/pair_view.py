"""What is shown of finished pairs: the player, the figures, the step map, the stages, and the tokens that stay."""

from __future__ import annotations

from typing import Any

import gradio as gr

from accel.evaluation.stage_bars import stage_bars
from accel.evaluation.verdict import verdict
from accel.runtime.repeat import reference_of
from ui.context import Context
from ui.panels import READ_ALOUD, headline, metric_cards, note
from ui.player import Player, pane_value
from ui.recorded import Recorded, recorded_pairs
from ui.side_settings import describe_side, side_of
from ui.store import Stored
from ui.timeline import READ_OUT, timeline
from ui.token_maps import token_maps

Update = dict[gr.components.Component, Any]


class PairView:
    """The right half of the Compare tab; create it inside a `gr.Blocks`. It starts with the first recorded pair."""

    def __init__(self, context: Context):
        self.context = context
        recorded = next(iter(recorded_pairs()), None)
        report = recorded.report if recorded else None
        self.headline = gr.HTML(headline(report) if report else "", elem_id="headline")
        self.player = Player({**recorded.player, "mode": "race"} if recorded else None, elem_id="player")
        banner = note(recorded.banner) if recorded else ""
        self.verdict = gr.HTML(banner, elem_id="verdict", html_template=READ_ALOUD)
        details = [part(report) for part in DETAILS.values()] if report else [""] * len(DETAILS)
        read_out = {"timeline": READ_OUT, "token-maps": READ_OUT}
        self.details = [
            gr.HTML(html, elem_id=name, js_on_load=read_out.get(name)) for name, html in zip(DETAILS, details)
        ]

    @property
    def components(self) -> list[gr.components.Component]:
        """Everything that `show` can change."""
        return [self.player, self.headline, self.verdict, *self.details]

    def show(self, pairs: list[Stored], mode: str | None = None) -> Update:
        """Pairs of the same reference: all candidates in the player, the figures of the last one.

        `mode`: the view that the player changes to; default: the visitor's.
        """
        report, value = pairs[-1].report, player_value(pairs)
        return {
            self.player: {**value, "mode": mode} if mode else value, self.headline: headline(report),
            self.verdict: note(verdict(report)),
            **{component: part(report) for component, part in zip(self.details, DETAILS.values())},
        }  # fmt: skip

    def show_recorded(self, recorded: Recorded) -> Update:
        """A recorded pair."""
        report = recorded.report
        return {
            self.player: {**recorded.player, "mode": "race"}, self.headline: headline(report),
            self.verdict: note(recorded.banner),
            **{component: part(report) for component, part in zip(self.details, DETAILS.values())},
        }  # fmt: skip

    def show_candidates(self, pairs: list[Stored]) -> Update:
        """The candidates of two pairs side by side, without figures: they were measured at different times."""
        panes = [pane(pair, "b") for pair in pairs]
        value = {**player_value(pairs[-1:]), "panes": panes, "curves": []}
        return {self.player: value, self.headline: "", self.verdict: "", **dict.fromkeys(self.details, "")}


def player_value(pairs: list[Stored]) -> dict:
    """The player's value for pairs of the same reference."""
    last = pairs[-1].report
    panes = [pane(pairs[-1], "a"), *(pane(pair, "b") for pair in pairs)]
    curves = [{"pane": i, "name": "SSIM", "values": ssim} for i, p in enumerate(pairs, 1)
              if (ssim := p.report["ssim_frames"])]  # fmt: skip
    sizes = {key: last[key] for key in ("fps", "frames", "height", "width")}
    return {**sizes, "panes": panes, "curves": curves}


def pane(pair: Stored, side: str) -> dict:
    """One side of a pair as a pane of the player."""
    url, settings = f"runs/{pair.id}", side_of(pair.report if side == "b" else reference_of(pair.report))
    return pane_value(describe_side(settings), f"{url}/{side}.mp4", f"{url}/{side}.jpg", pair.report["race"][side])


DETAILS = {
    "metric-cards": metric_cards, "timeline": lambda report: timeline(report["trace"]), "stages": stage_bars,
    "token-maps": lambda report: token_maps(report["trace"]),
}  # fmt: skip
