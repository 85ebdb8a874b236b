"""Workers whose pipeline costs nothing to load."""

import ui.quick_gradio  # noqa: F401, I001  before what imports Gradio
from types import SimpleNamespace

import pytest
from browser import CHROMIUM, FLAGS

from ui.worker import Workers


@pytest.fixture
def load_model(monkeypatch):
    """load_model(function): workers load their pipeline by calling function(model)."""

    def replace(function) -> None:
        defaults = SimpleNamespace(toy_world=False)
        pipe = SimpleNamespace(device=SimpleNamespace(type="cpu"))
        monkeypatch.setattr("accel.runtime.models.load_pipeline", lambda model, device: function(model) or pipe)
        monkeypatch.setattr("accel.runtime.models.model_defaults", lambda pipe, model: defaults)
        monkeypatch.setattr("ui.worker._free_memory", lambda: None)  # with all that tests import it takes seconds

    return replace


@pytest.fixture
def workers(load_model):
    load_model(lambda model: None)
    workers = Workers("none")
    workers.start()
    return workers


@pytest.fixture(scope="session")
def browser():
    """Chromium; tests that use it are marked with `browser.MARKS`."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()
