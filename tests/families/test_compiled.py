"""Compiled blocks, where a model class names them: the same result, and no new graph for a step or a run."""

import pytest
import torch
from families.tiny import TINY
from torch._dynamo.utils import counters

import accel
from accel.methods import AsymRnR, DisCa, FasterCache, StepCache

METHODS = [
    FasterCache(), AsymRnR(schedule="fixed", query_rate=0.5, kv_rate=0.5, correction="none"), DisCa(predictor="reuse"),
]  # fmt: skip


def run(pipe, inputs, steps: int) -> torch.Tensor:
    noise = torch.Generator().manual_seed(0)
    return pipe(**inputs, num_inference_steps=steps, generator=noise, output_type="latent").frames


@pytest.mark.parametrize(
    "name", ["skyreels_v2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("wan", "hunyuan_video", "ltx"))]
)
def test_compiled_blocks_are_compiled_once(name):
    pipe, inputs = TINY[name]()
    with accel.apply(pipe, METHODS):
        expected = run(pipe, inputs, 12)
    torch._dynamo.reset()
    counters.clear()
    pipe.transformer.compile_repeated_blocks(backend="eager")
    with accel.apply(pipe, METHODS):
        torch.testing.assert_close(run(pipe, inputs, 12), expected, atol=1e-4, rtol=0)
        graphs = counters["stats"]["unique_graphs"]
        run(pipe, inputs, 16)
    assert 0 < graphs == counters["stats"]["unique_graphs"]


def test_blocks_stay_compiled_where_flops_are_counted_by_a_call(monkeypatch):
    monkeypatch.setattr("accel.core.flops._COUNTED", {})
    pipe, inputs = TINY["hunyuan_video_15"]()
    torch._dynamo.reset()
    counters.clear()
    pipe.transformer.compile_repeated_blocks(backend="eager", fullgraph=True)
    with accel.apply(pipe, StepCache(full_steps="0 1 4 11")):
        run(pipe, inputs, 12)
    assert counters["stats"]["unique_graphs"] > 0
