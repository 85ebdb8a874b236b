"""Suites as data: every row is a setting that can be run."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from accel.evaluation import bench
from accel.evaluation.bench import SUITES, Setting
from accel.evaluation.report import paired, summarise, table
from accel.evaluation.result_log import ResultLog
from accel.runtime.generate import Video
from accel.runtime.models import ModelDefaults
from accel.runtime.presets import build_methods
from accel.students.scheduler import euler_sampling


@pytest.mark.parametrize("suite", SUITES)
def test_every_row_of_a_suite_can_be_built_and_the_first_is_plain(suite):
    rows = [row.settings() for row in SUITES[suite].values()]
    assert rows[0] == {"methods": {}, "steps": 48 if suite.startswith("gpd") else None, "guidance": None}
    for row in rows:
        build_methods(row["methods"])


def test_a_row_changes_single_knobs_of_its_preset():
    parameters = Setting("asymrnr", overrides={"asymrnr": {"budget": 0.9}}).settings()["methods"]["asymrnr"]
    assert parameters["budget"] == 0.9 and len(parameters) > 1


def test_a_ledger_goes_on_after_a_first_line_that_a_kill_cut_short(tmp_path):
    file = tmp_path / "results.jsonl"
    file.write_text('{"key": "mi')
    ResultLog(file, "mine").add(prompt="a")
    assert [line["prompt"] for line in ResultLog(file, "mine").lines] == ["a"]


def test_a_ledger_goes_on_after_a_line_that_a_kill_cut_short(tmp_path):
    file = tmp_path / "results.jsonl"
    ResultLog(file, "mine").add(prompt="a")
    ResultLog(file, "other").add(prompt="b")
    file.write_text(file.read_text() + '{"key": "mine", "pro')
    again = ResultLog(file, "mine")
    again.add(prompt="c")
    assert [line["prompt"] for line in ResultLog(file, "mine").lines] == ["a", "c"]


def test_results_of_another_model_or_machine_are_not_counted_in(pipe, monkeypatch):
    defaults = ModelDefaults()
    key = lambda model: bench._key(SUITES["fastercache"], model, pipe, defaults)
    first = key("some/model")
    assert first == key("some/model") and first != key("some/other")
    monkeypatch.setattr(bench, "environment", lambda _: {"device": "another"})
    assert key("some/model") != first


def test_a_students_files_are_part_of_its_results_key_and_of_no_others(pipe, students, tmp_path):
    key = lambda rows: bench._key(rows, str(tmp_path), pipe, ModelDefaults())
    plain, gpd = {"plain": Setting()}, {"gpd": Setting("gpd")}
    before = key(plain), key(gpd)
    (tmp_path / "gpd-N6" / "gpd.json").write_text("{}")
    assert key(plain) == before[0] and key(gpd) != before[1]


def test_the_first_order_solver_takes_the_own_levels_of_the_pipeline_and_leaves(pipe, sample):
    plain, own = sample(pipe), pipe.scheduler
    with euler_sampling(pipe, 20):
        levels = pipe.scheduler.sigmas.clone()
        euler = sample(pipe)
    own.set_timesteps(20)
    assert torch.equal(levels, own.sigmas) and pipe.scheduler is own
    assert not torch.equal(euler, plain) and torch.equal(sample(pipe), plain)


def test_a_row_whose_student_is_not_there_is_known(pipe, students, tmp_path):
    row = lambda folder: Setting("gpd", overrides={"gpd": {"student": str(folder)}})
    here, there = str(tmp_path), str(tmp_path / "none")
    assert row(tmp_path / "gpd-N6").is_available(here) and not row(tmp_path / "none").is_available(here)
    assert (
        Setting("gpd").is_available(here)
        and not Setting("gpd").is_available(there)
        and Setting("fastercache").is_available(there)
    )
    assert Setting("disca").is_available(here) and not Setting("disca").is_available(there)


def _timed(prompt, **rows):
    """A prompt with seconds and FLOPs of each row."""
    same = {"decode": 0.1, "psnr": None, "ssim": 1.0, "ssim_worst": 0.5, "adherence": {}}
    return {"prompt": prompt, "rows": {name: {"denoise": s, "flops": f, **same} for name, (s, f) in rows.items()}}


def test_half_the_time_is_twice_the_speed_and_half_the_flops_half_the_work():
    lines = [_timed("p", a=(4.0, 8), b=(2.0, 4)), _timed("q", a=(8.0, 8), b=(4.0, 4))]
    summary = summarise(lines, [("b", "a")])
    row = summary["rows"]["b"]
    assert (row["speedup"], row["work"], row["efficiency"], row["seconds"]) == (2.0, 0.5, 1.0, 3.0)
    assert summary["pairs"][0]["speed"] == 2.0


def test_a_suite_goes_on_where_it_was_left_and_fewer_results_do_not_replace_more(pipe, tmp_path, monkeypatch):
    made = []

    def generate(run, *_):
        made.append((run.prompt, run.seed, run.steps))
        video = np.full((5, 16, 16, 3), 10 * run.steps, np.uint8)
        trace = SimpleNamespace(flops_computed_and_full=lambda: (run.steps, run.steps))
        return Video(video, torch.ones(1, 4, 3, 2, 2), {"denoise": float(run.steps), "decode": 0.1}, trace)

    monkeypatch.setattr(bench, "load_pipeline", lambda model: pipe)
    monkeypatch.setattr(bench, "model_defaults", lambda *_: ModelDefaults(height=16, width=16, frames=5, steps=4))
    monkeypatch.setattr(bench, "generate", generate)
    monkeypatch.setattr(bench, "warm_up", lambda *_: None)
    monkeypatch.setitem(SUITES, "small", {"plain": Setting(), "fewer": Setting(steps=2)})
    bench.run_suite("small", 2, 1, "m", tmp_path)
    assert len(made) == 4
    summary = bench.run_suite("small", 2, 2, "m", tmp_path)
    assert len(made) == 8 and {seed for _, seed, _ in made[4:]} == {1}
    assert summary["n"] == 4 and summary["rows"]["fewer"]["speedup"] == 2.0
    with pytest.raises(ValueError, match="holds results of 4 prompts and seeds, more than 2: give another --out"):
        bench.run_suite("small", 2, 1, "m", tmp_path)
    monkeypatch.setitem(SUITES, "small", {"plain": Setting()})
    with pytest.raises(ValueError, match="holds results of the rows fewer"):
        bench.run_suite("small", 2, 2, "m", tmp_path)
    assert len(made) == 8


def _line(prompt, **ssim):
    same = {"decode": 0.1, "flops": 8, "psnr": None, "ssim_worst": 0.5, "adherence": {}}
    return {"prompt": prompt, "rows": {name: {"denoise": 2.0, "ssim": s, **same} for name, s in ssim.items()}}


def test_seeds_of_one_prompt_are_averaged_before_an_interval_is_drawn():
    lines = [_line("p", a=1.0, b=0.8), _line("p", a=1.0, b=0.4), _line("q", a=1.0, b=0.6), _line("q", a=1.0, b=0.6)]
    summary = summarise(lines, [("b", "a")])
    assert summary["rows"]["b"]["ssim"] == pytest.approx((0.6, 0.6, 0.6))  # both prompts have 0.6
    assert summary["n"] == 4 and "2 prompts x 2 seeds" in table({**summary, "device": "", "threads": 1, "dtype": ""})


def test_rows_are_held_against_each_other_prompt_by_prompt():
    lines = [_line("p", a=0.9, b=0.8), _line("q", a=0.5, b=0.4)]  # far apart between prompts, never between rows
    (pair,) = summarise(lines, [("b", "a"), ("b", "not measured")])["pairs"]
    assert pair["ssim"] == pytest.approx((-0.1, -0.1, -0.1)) and pair["speed"] == 1
    assert "| b | a | 1.00 | - | -0.100 [-0.100, -0.100] | - |" in paired({"pairs": [pair]})


@pytest.mark.parametrize("suite", bench.PAIRS)
def test_rows_that_are_held_against_each_other_are_rows_of_the_suite(suite):
    assert {name for pair in bench.PAIRS[suite] for name in pair} <= SUITES[suite].keys()
