"""Torch gets as many threads as a container may use CPUs."""

import os

import pytest

from accel.runtime.cpu_quota import limit_threads


@pytest.mark.parametrize(
    "quota, threads",
    [
        ("200000 100000\n", "2"),
        ("50000 100000\n", "1"),
        ("800000 100000\n", "4"),
        ("max 100000\n", None),
        ("?\n", None),
    ],
)
def test_the_quota_of_a_container_limits_the_threads(quota, threads, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "")  # so that it is as before afterwards
    del os.environ["OMP_NUM_THREADS"]
    monkeypatch.setattr("os.sched_getaffinity", lambda process: range(4))
    (tmp_path / "cpu.max").write_text(quota)
    limit_threads(tmp_path / "cpu.max")
    assert os.environ.get("OMP_NUM_THREADS") == threads


def test_a_number_that_is_given_stays(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    (tmp_path / "cpu.max").write_text("200000 100000\n")
    limit_threads(tmp_path / "cpu.max")
    assert os.environ.get("OMP_NUM_THREADS") == "3"
