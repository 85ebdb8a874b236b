"""Speed of the methods on random weights in a real model's size, at a small size on the CPU."""

import pytest
import torch

from accel.evaluation import gpu
from accel.evaluation.suites import Setting
from accel.runtime.generate import environment
from accel.runtime.models import ModelDefaults, load_pipeline
from accel.runtime.presets import load_preset

SMALL = {"num_attention_heads": 2, "attention_head_dim": 24, "ffn_dim": 64, "num_layers": 2, "text_dim": 32}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("layout")
    gpu.build(folder, SMALL, "cpu")
    return load_pipeline(str(folder), dtype=torch.bfloat16)


def test_settings_are_compared_with_the_first_one_and_a_second_call_measures_nothing(small, tmp_path, monkeypatch):
    defaults = ModelDefaults(height=32, width=32, frames=5, steps=12, text_length=16)
    settings = {"baseline": Setting(), "fastercache": Setting(overrides=load_preset("fastercache").methods)}
    measure = lambda: gpu.measure_layout(settings, 2, {"model": "-"}, small, defaults, tmp_path / "results.jsonl")
    rows = measure()
    assert rows["baseline"]["speedup"] == rows["baseline"]["work"] == 1
    assert 0.5 < rows["fastercache"]["work"] < 0.9 and rows["fastercache"]["peak_memory_bytes"] == 0  # 0 on a CPU
    low, high = rows["fastercache"]["speedup_range"]
    assert low <= rows["fastercache"]["speedup"] <= high
    monkeypatch.setattr("accel.evaluation.measure.generate", None)
    assert measure() == rows


def test_the_dtype_is_that_of_most_layers(small):
    assert {p.dtype for p in small.transformer.parameters()} == {torch.float32, torch.bfloat16}
    assert environment(small)["dtype"] == "bfloat16"


def test_an_unknown_layout_and_a_machine_without_a_gpu_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="unknown layout 'wan'; there are wan-1.3b"):
        gpu.run_gpu("wan", None, None, 1, tmp_path / "out")
    with pytest.raises(ValueError, match="this needs a GPU"):
        gpu.run_gpu("wan-1.3b", None, None, 1, tmp_path / "out")
    assert not (tmp_path / "out").exists()
