"""Suites as data: every row is a setting that can be run."""

import pytest

from accel import bench
from accel.bench import SUITES, Row
from accel.ledger import Ledger
from accel.models import Home
from accel.presets import build_methods


@pytest.mark.parametrize("suite", SUITES)
def test_every_row_of_a_suite_can_be_built_and_the_first_is_plain(suite):
    rows = [row.settings() for row in SUITES[suite].values()]
    assert rows[0] == {"methods": {}, "steps": None, "guidance": None}
    for row in rows:
        build_methods(row["methods"])


def test_a_row_changes_single_knobs_of_its_preset():
    knobs = Row("asymrnr", change={"asymrnr": {"budget": 0.9}}).settings()["methods"]["asymrnr"]
    assert knobs["budget"] == 0.9 and len(knobs) > 1


def test_a_ledger_goes_on_after_a_first_line_that_a_kill_cut_short(tmp_path):
    file = tmp_path / "results.jsonl"
    file.write_text('{"key": "mi')
    Ledger(file, "mine").add(prompt="a")
    assert [line["prompt"] for line in Ledger(file, "mine").lines] == ["a"]


def test_a_ledger_goes_on_after_a_line_that_a_kill_cut_short(tmp_path):
    file = tmp_path / "results.jsonl"
    Ledger(file, "mine").add(prompt="a")
    Ledger(file, "other").add(prompt="b")
    file.write_text(file.read_text() + '{"key": "mine", "pro')
    again = Ledger(file, "mine")
    again.add(prompt="c")
    assert [line["prompt"] for line in Ledger(file, "mine").lines] == ["a", "c"]


def test_results_of_another_model_or_machine_are_not_counted_in(pipe, monkeypatch):
    home = Home()
    key = lambda model: bench._key(SUITES["fastercache"], model, pipe, home)
    first = key("some/model")
    assert first == key("some/model") and first != key("some/other")
    monkeypatch.setattr(bench, "machine", lambda _: {"device": "another"})
    assert key("some/model") != first
