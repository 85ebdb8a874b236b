"""The Sweep tab's endpoint for programs."""

from __future__ import annotations

from collections.abc import Iterator

import gradio as gr

from accel.errors import AccelError
from accel.evaluation.sweep import parse_axis_option
from ui.context import Context
from ui.store import own_or_new
from ui.sweep_job import Sweep, SweepState
from ui.sweep_plan import make_plan


class SweepApi:
    """The endpoint; its class holds what the page's tabs share."""

    def __init__(self, context: Context):
        self.context = context

    def sweep(
        self, prompt: str, axis: str, second_axis: str = "", plain_steps: str = "", seed: int = 1,
        candidate: dict = {"preset": "stepcache"}, reference: dict = {}, visitor: str = "",  # noqa: B006
    ) -> Iterator[list[dict]]:  # fmt: skip
        """Measure the values of one or two settings against one reference; yields the results so far.

        An axis is NAME=VALUES, as "steps=20,30,50" or "fastercache.attention_interval=2..6"; `plain_steps` are steps in
        which the stock pipeline is measured too. Sides are those of `run`. A result has the id of its stored pair, or
        the reason why its setting was refused. `visitor` is any text that you keep, for `stop` and `history`.

        Example: sweep("a large red star spins", "steps=20,30", "fastercache.attention_interval=2..4")
        """
        from ui.api import side_from

        run = {"model": self.context.model, "prompt": prompt, "seed": seed}
        try:
            axes = [parse_axis_option(option) for option in (axis, second_axis) if option]
            plan = make_plan(run, side_from(reference), side_from(candidate), axes, plain_steps)
        except AccelError as error:
            raise gr.Error(str(error)) from None
        sweep = Sweep(self.context, own_or_new(visitor), plan)
        yield []
        for kind, data in sweep.events():
            if kind == "result":
                yield results(sweep.state)
            elif kind == "ended" and data["reason"]:
                raise gr.Error(data["reason"])


def results(state: SweepState) -> list[dict]:
    """The results of a sweep so far, JSON-ready."""
    found = zip(state.plan.cells, state.results)
    return [
        {"label": c.label, "values": c.values, "run_id": r.run_id, **(r.row or {"reason": r.reason})}
        for c, r in found
        if r
    ]
