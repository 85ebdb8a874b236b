"""What methods will hold in memory on real models at their usual sizes, computed from the shapes alone."""

from __future__ import annotations

from typing import NamedTuple

from ..methods import METHODS
from ..runtime.generate import planned_spec
from ..runtime.models import model_defaults
from ..runtime.run import build_run
from .layouts import Layout, build

STEPS = 50
SETTINGS = {
    "`fastercache`": METHODS["fastercache"](),
    "`fastercache`, `fp8`": METHODS["fastercache"](cache_format="fp8"),
    "`asymrnr`": METHODS["asymrnr"](),
    "`asymrnr`, uncorrected": METHODS["asymrnr"](correction="none"),
    "`disca`, `taylor-1`": METHODS["disca"](predictor="taylor-1"),
    "`stepcache`": METHODS["stepcache"](),
}


class Forecast(NamedTuple):
    """A model's usual size, its video tokens, and the most GiB that each setting will hold."""

    size: str
    tokens: int
    gib: list[float]


def forecast(layout: Layout) -> Forecast:
    """The forecast for one video of 50 steps in bfloat16."""
    pipe = build(layout, "meta")
    run = build_run(model_defaults(pipe, "-"), model="-", prompt="-", steps=STEPS, **layout.size)
    spec = planned_spec(run, pipe)
    gib = [method.estimate_memory(spec) / 2**30 for method in SETTINGS.values()]
    return Forecast(f"{run.width}x{run.height}, {run.frames} frames", spec.tokens, gib)
