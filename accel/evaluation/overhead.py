"""How much longer a pipeline takes with methods that change nothing."""

from __future__ import annotations

from collections.abc import Sequence
from math import log

from tqdm import tqdm

from ..methods.base import Method

STEPS, PAIRS = 2, 100  # many short runs in turn: a slow minute of the machine affects both sides


def overheads(pipe, inputs: dict, methods: Sequence[Method], pairs: int) -> list[float]:
    """The logarithm of a run's time with `methods` over that of the stock pipeline, of each of `pairs` pairs of runs.

    Near 0 it is the relative extra time, and noise, which may slow either run, does not move its mean.
    `inputs` are those of the pipeline's call. Nothing is decoded. Which run of a pair comes first alternates.
    """
    import torch

    from ..core.calls import synchronized_time
    from ..runtime.apply import apply

    device = next(pipe.transformer.parameters()).device

    def seconds() -> float:
        noise, began = torch.Generator("cpu").manual_seed(0), synchronized_time(device)
        pipe(**inputs, num_inference_steps=STEPS, generator=noise, output_type="latent")
        return synchronized_time(device) - began

    def with_methods() -> float:
        with apply(pipe, list(methods)):
            return seconds()

    with_methods()  # counts the FLOPs of this shape, once
    found = []
    for i in tqdm(range(pairs), desc="overhead"):
        if i % 2:
            stock, ours = seconds(), with_methods()
        else:
            ours, stock = with_methods(), seconds()
        found.append(log(ours / stock))
    return found
