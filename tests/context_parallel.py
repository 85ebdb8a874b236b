"""One rank of a run under diffusers' context parallelism, for `core/test_context_parallel.py`; prints a line of JSON.

torchrun --nproc-per-node 2 tests/context_parallel.py
"""

import json
from unittest.mock import patch

import torch
from diffusers import ContextParallelConfig
from families.tiny import wan
from torch import distributed

import accel
from accel.core.trace import Trace
from accel.errors import AccelError
from accel.methods import DisCa, FasterCache

STEPS = 12


def run(pipe, inputs: dict, method=None) -> tuple[torch.Tensor, Trace]:
    """Final latents and trace of one run."""
    with accel.apply(pipe, method) as trace:
        generator = torch.Generator().manual_seed(0)
        latents = pipe(**inputs, num_inference_steps=STEPS, generator=generator, output_type="latent").frames
    return latents, trace


def refusal(pipe, method) -> str:
    """Why a method does not run on the pipeline."""
    try:
        with accel.apply(pipe, method):
            return ""
    except AccelError as error:
        return str(error)


def main() -> None:
    """Compare runs on one process and on two."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    pipe, inputs = wan()
    alone = {name: run(pipe, inputs, method) for name, method in (("baseline", None), ("fastercache", FasterCache))}
    with patch("torch.accelerator.device_count", return_value=2):  # diffusers counts accelerators
        pipe.transformer.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))
    shared = {name: run(pipe, inputs, method) for name, method in (("baseline", None), ("fastercache", FasterCache))}
    report = {
        "error": {name: (shared[name][0] - alone[name][0]).abs().max().item() for name in alone},
        "effect": (alone["fastercache"][0] - alone["baseline"][0]).abs().max().item(),
        "same_events": shared["fastercache"][1].events == alone["fastercache"][1].events,
        "bytes": [runs["fastercache"][1].peak_bytes for runs in (alone, shared)],
        "refused": [refusal(pipe, method) for method in (accel.load_preset("asymrnr"), DisCa(predictor="reuse"))],
    }
    reports = [None, None]
    distributed.all_gather_object(reports, report)
    if distributed.get_rank() == 0:
        print(json.dumps(reports))
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
