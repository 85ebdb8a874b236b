"""Speed of the methods on random weights in a real layout."""

import pytest
import torch
from typer import BadParameter

from accel.evaluation import gpu as layout
from accel.runtime.generate import build_run, environment
from accel.runtime.models import ModelDefaults, load_pipeline
from accel.runtime.presets import load_preset

SMALL = {"num_attention_heads": 2, "attention_head_dim": 24, "ffn_dim": 64, "num_layers": 2, "text_dim": 32}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("layout")
    layout.build(folder, SMALL, "cpu")
    return load_pipeline(str(folder), dtype=torch.bfloat16)


def test_rows_are_held_against_the_first_one(small):
    defaults = ModelDefaults(height=64, width=64, frames=5, steps=12, text_length=16)
    methods = {"baseline": {}, "fastercache": load_preset("fastercache").methods}
    runs = {name: build_run(defaults, model="-", prompt="a star", methods=own) for name, own in methods.items()}
    rows = layout.figures(runs, small, defaults, 2)
    assert rows["baseline"]["speedup"] == rows["baseline"]["work"] == 1
    assert (
        0.5 < rows["fastercache"]["work"] < 0.9 and rows["fastercache"]["peak_memory_bytes"] == 0
    )  # on a CPU nobody counts
    low, high = rows["fastercache"]["speedup_range"]
    assert low <= rows["fastercache"]["speedup"] <= high


def test_a_model_in_half_precision_says_so_though_some_layers_are_not(small):
    assert {p.dtype for p in small.transformer.parameters()} == {torch.float32, torch.bfloat16}
    assert environment(small)["dtype"] == "bfloat16"


def test_what_cannot_be_timed_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BadParameter, match="unknown layout 'wan'; there are wan-1.3b"):
        layout.main(tmp_path / "out", "wan")
    with pytest.raises(BadParameter, match="this needs a GPU"):
        layout.main(tmp_path / "out")
    assert not (tmp_path / "out").exists()
