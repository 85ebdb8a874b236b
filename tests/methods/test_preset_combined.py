"""The preset `combined` end to end: FasterCache and AsymRnR together, on a small random Wan with a profile."""

import torch

import accel
from accel.methods.asymrnr.budget import Profile


def test_combined_reuses_rebuilds_and_reduces_and_restores_the_pipeline(pipe, sample, tmp_path):
    costs = {f"blocks.{i}.attn1": [(1.0 + i, 1.0)] for i in range(2)}
    Profile(grid=(3, 4, 4), steps=50, rate=0.5, costs=costs).save(tmp_path / "asymrnr.json")
    pipe.register_to_config(_name_or_path=str(tmp_path))
    baseline = sample(pipe, steps=30)
    with accel.apply(pipe, accel.load_preset("combined")) as trace:
        latents = sample(pipe, steps=30)
        assert torch.equal(sample(pipe, steps=30), latents)
    assert latents.isfinite().all() and not torch.equal(latents, baseline)
    assert {"compute", "reuse", "reduce"} == set(trace.summary()["attention"])
    assert {"compute", "rebuild"} == set(trace.summary()["calls"])
    assert trace.summary()["flops_ratio"] < 0.7 and trace.peak_bytes <= trace.estimated_bytes
    assert not trace.messages
    assert torch.equal(sample(pipe, steps=30), baseline)
