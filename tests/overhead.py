"""How much longer a stock pipeline takes with methods that change nothing: `python tests/overhead.py [family ...]`.

Tiny pipelines of every family, at a size where a call takes tens of milliseconds. Stock and neutral runs alternate; the
ratio is that of each pair, with its median and quartiles. Leave the machine alone meanwhile.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
import warnings
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

from families.tiny import TINY  # noqa: E402

import accel  # noqa: E402
from accel.methods import METHODS  # noqa: E402

FAMILIES = ["wan", "cogvideox", "hunyuan_video", "hunyuan_video_15", "ltx", "mochi", "skyreels_v2", "kandinsky5"]
NEUTRAL = [METHODS[name](**METHODS[name].neutral) for name in ("fastercache", "asymrnr", "disca", "stepcache")]
SIZE, STEPS, PAIRS = 320, 10, 9


def seconds(pipe, inputs: dict) -> float:
    """Of one run without decoding."""
    noise, began = torch.Generator().manual_seed(0), time.perf_counter()
    pipe(**inputs, num_inference_steps=STEPS, generator=noise, output_type="latent")
    return time.perf_counter() - began


def measure(name: str) -> dict[str, float]:
    """Median and quartiles of the ratio of a neutral run's time to a stock run's."""
    pipe, inputs = TINY[name]()
    inputs |= {"height": SIZE, "width": SIZE}
    seconds(pipe, inputs)
    with accel.apply(pipe, NEUTRAL):  # counts the FLOPs of this shape once
        seconds(pipe, inputs)
    ratios = []
    for _ in range(PAIRS):
        stock = seconds(pipe, inputs)
        with accel.apply(pipe, NEUTRAL):
            ratios.append(seconds(pipe, inputs) / stock)
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {"ratio": round(middle, 4), "low": round(low, 4), "high": round(high, 4), "stock_seconds": round(stock, 2)}


def main(names: list[str]) -> None:
    warnings.simplefilter("ignore")
    results = {}
    for name in names or FAMILIES:
        results[name] = measure(name)
        print(f"{name:18} {results[name]}")
    print(json.dumps({"n": PAIRS, "steps": STEPS, "threads": torch.get_num_threads(), "families": results}))


if __name__ == "__main__":
    main(sys.argv[1:])
