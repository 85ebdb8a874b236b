"""How much longer each family takes with methods that change nothing: `python tests/overhead.py [family ...]`.

Tiny pipelines of every family, related to a size where a call takes tens of milliseconds. Leave the machine alone.
"""

from __future__ import annotations

import json
import statistics
import sys
import warnings
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

from families.tiny import TINY  # noqa: E402

from accel.evaluation.overhead import STEPS, overheads  # noqa: E402
from accel.methods import METHODS  # noqa: E402

FAMILIES = ["wan", "cogvideox", "hunyuan_video", "hunyuan_video_15", "ltx", "mochi", "skyreels_v2", "kandinsky5"]
NEUTRAL = [METHODS[name](**METHODS[name].neutral) for name in ("fastercache", "asymrnr", "disca", "stepcache")]
SIZE, PAIRS = 320, 40


def measure(name: str) -> dict[str, float]:
    """Median and quartiles of the extra time of a neutral run, relative to a stock run."""
    pipe, inputs = TINY[name]()
    small = {name: inputs[name] for name in ("height", "width")}
    found = overheads(pipe, {**inputs, "height": SIZE, "width": SIZE}, small, NEUTRAL, PAIRS)
    low, middle, high = statistics.quantiles(found, n=4)
    return {"overhead": round(middle, 4), "low": round(low, 4), "high": round(high, 4)}


def main(names: list[str]) -> None:
    warnings.simplefilter("ignore")
    results = {}
    for name in names or FAMILIES:
        results[name] = measure(name)
        print(f"{name:18} {results[name]}")
    print(json.dumps({"n": PAIRS, "steps": STEPS, "threads": torch.get_num_threads(), "families": results}))


if __name__ == "__main__":
    main(sys.argv[1:])
