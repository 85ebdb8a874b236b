"""Speed of the methods on random weights in real models' layouts, at a small size on the CPU."""

import json

import pytest
import torch

from accel.evaluation import gpu
from accel.runtime.generate import environment

FEW = ("baseline", "neutral", "fastercache")


def test_settings_are_compared_with_the_baseline(monkeypatch):
    monkeypatch.setattr(gpu, "SETTINGS", {name: gpu.SETTINGS[name] for name in FEW})
    pipe, inputs = gpu.prepare("wan-1.3b", "cpu", small=True)
    rows = gpu.measure(pipe, {**inputs, "num_inference_steps": 10}, 1, 1e12, "-")
    assert rows["baseline"]["speedup"] == rows["baseline"]["work"] == rows["neutral"]["work"] == 1
    assert 0.5 < rows["fastercache"]["work"] < 0.9 and rows["fastercache"]["peak_memory_bytes"] == 0  # 0 on a CPU


@pytest.mark.slow
@pytest.mark.parametrize("layout", gpu.TIMED)
def test_there_is_a_table_of_eager_and_one_of_compiled_blocks(layout, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "SETTINGS", {name: gpu.SETTINGS[name] for name in FEW})
    done = gpu.run_gpu(layout, 10, 1, True, tmp_path)
    assert list(done["speedups"]) == [layout, f"{layout}-compiled"]
    for title in done["speedups"]:
        found = json.loads((tmp_path / title / "results.json").read_text())
        assert (found["layout"], found["n"], found["steps"], list(found["rows"])) == (title, 1, 10, list(FEW))
        assert found["rows"]["baseline"]["roofline"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("setting", gpu.SETTINGS)
@pytest.mark.parametrize("layout", gpu.TIMED)
def test_every_setting_runs_in_every_layout(layout, setting):
    pipe, inputs = gpu.prepare(layout, "cpu", small=True)
    assert gpu.run(pipe, {**inputs, "num_inference_steps": 10}, gpu.SETTINGS[setting]).seconds > 0


def test_figures_are_medians_of_the_runs_against_the_baseline_of_the_same_round():
    measured = lambda seconds, flops, peak: gpu.Measured(seconds, flops, peak)
    rounds = [(measured(s, 50, 7 + i), measured(b, 0, 5)) for i, (s, b) in enumerate([(1, 2), (2, 2), (1, 4)])]
    row = gpu._row(rounds, flops=100, roof=200.0)
    assert (row["seconds"], row["speedup"], row["speedup_range"]) == (1, 2, [1, 4])
    assert (row["work"], row["efficiency"], row["roofline"], row["peak_memory_bytes"]) == (0.5, 1, 0.25, 9)


def test_the_dtype_is_that_of_most_layers():
    pipe, _ = gpu.prepare("wan-1.3b", "cpu", small=True)
    assert {p.dtype for p in pipe.transformer.parameters()} == {torch.float32, torch.bfloat16}
    assert environment(pipe)["dtype"] == "bfloat16"


def test_an_unknown_layout_and_a_machine_without_a_gpu_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="unknown layout 'wan'; there are ltx, cogvideox-2b, wan-1.3b"):
        gpu.run_gpu("wan", 10, 1, False, tmp_path / "out")
    with pytest.raises(ValueError, match="this needs a GPU"):
        gpu.run_gpu(None, 10, 1, False, tmp_path / "out")
    assert not (tmp_path / "out").exists()
