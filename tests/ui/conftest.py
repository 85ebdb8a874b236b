"""A worker whose pipeline costs nothing to load."""

from types import SimpleNamespace

import pytest

from ui.worker import Worker


@pytest.fixture
def load_model(monkeypatch):
    """load_model(function): workers load their pipeline by calling function(model)."""

    def replace(function) -> None:
        monkeypatch.setattr("accel.runtime.models.load_pipeline", function)
        monkeypatch.setattr("accel.runtime.models.model_defaults", lambda pipe, model: None)

    return replace


@pytest.fixture
def worker(load_model):
    load_model(lambda model: SimpleNamespace())
    worker = Worker("none")
    worker.start()
    return worker
