"""How much longer a pipeline takes with methods that change nothing."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from tqdm import tqdm

from ..methods.base import Method

STEPS, PAIRS = 2, 200  # many short runs in turn: a slow minute of the machine affects both sides
FULL_RUNS = 5  # at the full size


def overheads(pipe, inputs: dict, small: dict, methods: Sequence[Method], pairs: int) -> list[float]:
    """The extra time of a run with `methods`, relative to the stock pipeline's time, of each of `pairs` pairs of runs.

    `inputs` are those of the pipeline's call, `small` what a call of a very small video has instead. What is added is
    Python, which takes as long for any video: so the extra seconds are those of the small one, where the noise of the
    machine does not hide them, and the time that they are related to is that of the full size. Nothing is decoded.
    Which run of a pair comes first alternates.
    """
    import torch

    from ..core.calls import synchronized_time
    from ..runtime.apply import apply

    device = next(pipe.transformer.parameters()).device

    def seconds(**size) -> float:
        noise, began = torch.Generator("cpu").manual_seed(0), synchronized_time(device)
        pipe(**{**inputs, **size}, num_inference_steps=STEPS, generator=noise, output_type="latent")
        return synchronized_time(device) - began

    def with_methods() -> float:
        with apply(pipe, list(methods)):
            return seconds(**small)

    full = median(seconds() for _ in range(FULL_RUNS))
    with_methods()  # counts the FLOPs of this shape, once
    found = []
    for i in tqdm(range(pairs), desc="overhead"):
        if i % 2:
            stock, ours = seconds(**small), with_methods()
        else:
            ours, stock = with_methods(), seconds(**small)
        found.append((ours - stock) / full)
    return found
