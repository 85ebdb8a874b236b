"""The page as a whole, without a browser: what starting it imports, its presets and its API."""

import json
import subprocess
import sys

import gradio as gr
import pytest

import app
from accel.runtime.models import TINY
from accel.runtime.paths import ROOT
from accel.runtime.presets import load_preset, preset_names


@pytest.fixture(scope="module")
def page():
    page = app.Page(TINY)
    page.demo = page.build()
    return page


def test_building_the_page_imports_no_library_that_only_a_run_needs():
    code = (
        "import json, sys, app; app.Page(app.TINY).build();"
        "print(json.dumps(sorted(set(sys.modules) & {'torch', 'diffusers', 'transformers', 'scipy', 'skimage'})))"
    )
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert json.loads(out.stdout.splitlines()[-1]) == []


def test_the_endpoints_are_run_and_stop(page):
    assert list(page.demo.get_api_info()["named_endpoints"]) == ["/run_pair", "/stop"]


def test_presets_are_offered_by_title_where_they_have_one(page):
    assert [name for _, name in page.preset.choices] == preset_names()
    assert dict(page.preset.choices)["ToDo (token downsampling)"] == "todo"


@pytest.mark.parametrize("name", preset_names())
def test_a_preset_sets_the_methods_that_it_names(page, name):
    values, preset = page.load_preset(name), load_preset(name)
    components = page.controls.components
    settings = page.controls.settings([values[component] for component in components])
    assert set(settings) == set(preset.methods)
    assert values.get(page.steps, preset.steps) == preset.steps
    assert values[page.preset_warning] == ""


def test_stop_without_a_run_says_so(page):
    assert "Nothing is running" in page.stop_job(gr.Request(session_hash="nobody"))
