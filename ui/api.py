"""The page's endpoints for programs: what the buttons do, with typed arguments and JSON results.

from gradio_client import Client
result = Client("http://127.0.0.1:7860").predict("a large red star spins", 1, {"preset": "stepcache"}, api_name="/run")
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gradio as gr

from accel.errors import AccelError
from accel.runtime.presets import RUN_SETTINGS, Preset, load_preset, preset_names, with_parameter
from ui.context import Context, compare_work
from ui.endpoints import add_endpoint
from ui.preset_cards import PLAIN
from ui.share import refuse_hidden
from ui.side_settings import Side
from ui.store import own_or_new

SIDE_KEYS = ("preset", "changes", *RUN_SETTINGS)


def add_endpoints(context: Context, page) -> None:
    """Register every endpoint; call it inside the page's `gr.Blocks`."""
    api = Api(context)
    for function in (api.run, api.stop, api.preset, api.presets):
        add_endpoint(function)
    page.history.add_endpoints()
    page.vote.add_endpoints()
    page.sweep.add_endpoints()
    page.code.add_endpoints()


class Api:
    """The endpoints that generate."""

    def __init__(self, context: Context):
        self.context = context

    def run(
        self, prompt: str, seed: int = 1, candidate: dict = {"preset": "stepcache"}, reference: dict = {},  # noqa: B006
        model: str = "", visitor: str = "",
    ) -> Iterator[dict]:  # fmt: skip
        """Generate a reference and a candidate from the same noise; the last result has the report and the files.

        A side is {"preset": NAME, "changes": {"METHOD.PARAMETER": VALUE}, "steps": N, "guidance": G, "solver": NAME,
        "shift": S}; what is left out is the model's own, and {} is the stock pipeline. Results before the last one tell
        the progress. `visitor` is any text that you keep, for `stop` and `history`.

        Example: run("a large red star spins", 1, {"preset": "fastercache", "steps": 30})
        """
        sides = [side_from(reference), side_from(candidate)]
        visitor, model = own_or_new(visitor), model or self.context.model
        work = compare_work(self.context, visitor, {"model": model, "prompt": prompt, "seed": seed}, *sides)
        for kind, data in self.context.workers.stream(self.context.workers.submit(work, visitor, model)):
            if kind == "pair":
                yield self._result(data["run_id"])
            elif kind == "step":
                yield {"state": "step", "side": data["which"], "done": data["done"]}
            elif kind in ("refused", "failed"):
                raise gr.Error(data["reason"])
            elif kind == "stopped":
                yield {"state": "stopped"}
            elif kind == "waiting":
                yield {"state": "waiting", **data}

    def _result(self, run_id: str) -> dict:
        report = self.context.store.find(run_id).report
        files = {name: f"runs/{run_id}/{name}" for name in ("a.mp4", "b.mp4", "run.json", "preset.yaml", "report.zip")}
        return {"state": "done", "run_id": run_id, "files": files, "report": report}

    def stop(self, visitor: str) -> dict:
        """Stop all runs of a visitor, waiting or running, within one step.

        Example: stop("my-id")
        """
        return {"stopped": self.context.workers.stop(visitor)}

    def preset(self, name: str) -> dict:
        """The settings of a preset: methods with all their parameters, steps and guidance.

        Example: preset("stepcache")
        """
        return known_preset(name).model_dump()

    def presets(self) -> list[str]:
        """The names of all presets.

        Example: presets()
        """
        return preset_names()


def side_from(values: Any) -> Side:
    """A side from the JSON of `run`. Raises AccelError for what it does not know."""
    if not isinstance(values, dict):
        raise AccelError(f"a side is a JSON object with some of {', '.join(SIDE_KEYS)}")
    if unknown := [key for key in values if key not in SIDE_KEYS]:
        raise AccelError(f"unknown setting {unknown[0]!r} of a side; known are {', '.join(SIDE_KEYS)}")
    side = known_preset(values.get("preset") or PLAIN).settings()
    changes = values.get("changes") or {}
    if not isinstance(changes, dict):
        raise AccelError('changes is a JSON object: {"METHOD.PARAMETER": VALUE}')
    for target, value in changes.items():
        method, _, parameter = str(target).partition(".")
        refuse_hidden({method: {parameter: value}})
        side["methods"] = with_parameter(side["methods"], method, parameter, value)
    return {**side, **{key: values[key] for key in RUN_SETTINGS if values.get(key) is not None}}


def known_preset(name: Any) -> Preset:
    """A shipped preset, or no method for "plain". Raises AccelError for another name; it is never taken as a path."""
    if name == PLAIN:
        return Preset()
    if name not in preset_names():
        raise AccelError(f"no preset {str(name)[:40]!r}; there are {', '.join([*preset_names(), PLAIN])}")
    return load_preset(name)
