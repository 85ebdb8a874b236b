"""A log of results survives a kill in the middle of a line."""

import pytest

from accel.errors import AccelError
from accel.evaluation.result_log import ResultLog, config_hash

KEYS = {"half": "mine"}


def test_a_log_continues_after_its_first_line_was_cut_short(tmp_path):
    file = tmp_path / "results.jsonl"
    file.write_text('{"key": "mi')
    ResultLog(file, KEYS).add("half", prompt="a")
    assert [line["prompt"] for line in ResultLog(file, KEYS).lines] == ["a"]


def test_a_log_continues_after_a_line_that_was_cut_short_and_ignores_other_keys_and_settings(tmp_path):
    file = tmp_path / "results.jsonl"
    ResultLog(file, KEYS).add("half", prompt="a")
    ResultLog(file, {"half": "other"}).add("half", prompt="b")
    ResultLog(file, {"quarter": "mine"}).add("quarter", prompt="b")
    file.write_text(file.read_text() + '{"key": "mine", "pro')
    log = ResultLog(file, KEYS)
    log.add("half", prompt="c")
    assert [line["prompt"] for line in ResultLog(file, KEYS).lines] == ["a", "c"]


def test_a_damaged_line_is_named(tmp_path):
    file = tmp_path / "results.jsonl"
    file.write_text('{"key": "mine", "setting": "half"}\n{"key": \n')
    with pytest.raises(AccelError, match="^line 2 of .*results.jsonl is damaged: delete that line$"):
        ResultLog(file, KEYS)


def test_files_of_other_processes_are_joined_and_a_backup_is_left_alone(tmp_path):
    line = '{"key": "mine", "setting": "half", "prompt": "%s"}\n'
    names = {"results.jsonl": "a", "results-1.jsonl": "b", "results-12.jsonl": "c", "results-before.jsonl": "d"}
    for name, prompt in names.items():
        (tmp_path / name).write_text(line % prompt)
    assert [line["prompt"] for line in ResultLog(tmp_path / "results.jsonl", KEYS).lines] == ["a", "b", "c"]
    assert {file.name for file in tmp_path.iterdir()} == {"results.jsonl", "results-before.jsonl"}


def test_a_hash_is_equal_for_equal_values_only():
    assert config_hash({"a": 1}, [2]) == config_hash({"a": 1}, [2]) != config_hash({"a": 1}, [3])
