"""Costs measured block by block, with a generator whose errors are known."""

from types import SimpleNamespace

import numpy as np
import pytest

from accel.evaluation import asymrnr_profile as profile
from accel.evaluation import measure
from accel.methods.asymrnr.budget import load_profile
from accel.runtime.models import ModelDefaults

SHIFT = {"blocks.0.attn1": 2, "blocks.1.attn1": 4}  # grey levels by which a frame changes if a block is reduced


@pytest.fixture
def runs(pipe, monkeypatch):
    """The runs that were generated; each gives grey frames, changed by the block's shift."""
    seen = []

    def generate(run, *_):
        seen.append(run)
        (parameters,) = run.methods.values() or ({},)
        shift = sum(SHIFT[layer] for layer in parameters.get("rates", {}))
        trace = SimpleNamespace(
            summary=lambda: {"flops_ratio": 0.9}, messages=[], flops_computed_and_full=lambda: (9, 10)
        )
        frames = np.full((2, 16, 16, 3), 100 + shift, np.uint8)
        return SimpleNamespace(frames=frames, trace=trace, seconds={"denoise": 1.0, "decode": 0.1})

    monkeypatch.setattr(measure, "generate", generate)
    monkeypatch.setattr(measure, "warm_up", lambda *_: None)
    monkeypatch.setattr(profile, "load_pipeline", lambda _: pipe)
    monkeypatch.setattr(profile, "model_defaults", lambda *_: ModelDefaults())
    return seen


@pytest.mark.slow
def test_twice_the_error_is_four_times_the_cost(runs, tmp_path):
    profile.run_profile("nobody/nothing", 2, 6, tmp_path)
    written = load_profile(tmp_path / "asymrnr.json", list(SHIFT))
    assert (written.grid, written.steps) == ((41, 30, 52), 6)
    assert written.costs == {"blocks.0.attn1": [(0.25, 0.25)] * 5, "blocks.1.attn1": [(1.0, 1.0)] * 5}
    report = (tmp_path / "profile.md").read_text()
    single = [parameters for run in runs for parameters in run.methods.values() if "rates" in parameters]
    assert {parameters["correction"] for parameters in single} == {"none"}
    assert "| blocks.0.attn1 | 0.2500 |" in report and "| both 0.8 | 0.90 |" in report
    assert (tmp_path / "profile.png").is_file()


def test_too_few_steps_for_the_spans_are_refused(runs, tmp_path):
    with pytest.raises(ValueError, match="^1 step is too few: each of the 5 spans needs one"):
        profile.check_steps(1)
    with pytest.raises(ValueError, match="^5 steps are too few: each of the 5 spans needs one"):
        profile.run_profile("nobody/nothing", 1, 5, tmp_path)


def test_more_prompts_than_there_are_examples_are_refused(runs, tmp_path):
    with pytest.raises(ValueError, match="999 prompts are too many: there are 24 examples"):
        profile.run_profile("nobody/nothing", 999, 6, tmp_path)


def test_a_second_start_measures_only_what_is_missing(runs, tmp_path):
    profile.run_profile("nobody/nothing", 1, 6, tmp_path)
    first = len(runs)
    profile.run_profile("nobody/nothing", 1, 6, tmp_path)
    assert len(runs) == first == 1 + 16 + 6 + 2 * 5 * 2  # baseline, all blocks, ways to merge, each block alone
    log = tmp_path / "profile.jsonl"
    log.write_text(log.read_text()[:-9])  # killed in the middle of the last line
    profile.run_profile("nobody/nothing", 1, 6, tmp_path)
    assert len(runs) == first + 2
