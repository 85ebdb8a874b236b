"""Workers whose pipeline costs nothing to load."""

from types import SimpleNamespace

import pytest

from ui.worker import Workers


@pytest.fixture
def load_model(monkeypatch):
    """load_model(function): workers load their pipeline by calling function(model)."""

    def replace(function) -> None:
        defaults = SimpleNamespace(toy_world=False)
        pipe = SimpleNamespace(device=SimpleNamespace(type="cpu"))
        monkeypatch.setattr("accel.runtime.models.load_pipeline", lambda model, device: function(model) or pipe)
        monkeypatch.setattr("accel.runtime.models.model_defaults", lambda pipe, model: defaults)

    return replace


@pytest.fixture
def workers(load_model):
    load_model(lambda model: None)
    workers = Workers("none")
    workers.start()
    return workers
