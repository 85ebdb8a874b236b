"""The page as a whole, without a browser: what starting it imports, its endpoints, presets and settings."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import gradio as gr
import pytest

import app
from accel.errors import AccelError
from accel.methods import METHODS
from accel.runtime.example_prompts import example_prompts
from accel.runtime.models import TINY, ModelDefaults, read_defaults
from accel.runtime.paths import ROOT
from accel.runtime.presets import Preset, load_preset, preset_names, required_settings
from ui.api import side_from
from ui.context import Context
from ui.model_list import ModelChoice, model_choices
from ui.preset_cards import PLAIN, card_choices
from ui.recorded import RECORDINGS, recorded_pairs
from ui.store import Store
from ui.worker import Workers

HEAVY = ["torch", "diffusers", "transformers", "scipy", "skimage"]
BUILD = """
import json, pathlib, sys, tempfile, app
from ui.context import Context; from ui.store import Store; from ui.worker import Workers; from ui.model_list import *
app.Page(Context({model!r}, Workers({model!r}), Store(pathlib.Path(tempfile.mkdtemp())), model_choices())).build()
print(json.dumps(sorted(set(sys.modules) & set({heavy}))))
"""
ENDPOINTS = {"run", "stop", "sweep", "history", "delete_run", "vote", "ranking", "code", "preset", "presets"}


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    store = Store(tmp_path_factory.mktemp("data"))
    page = app.Page(Context(TINY, Workers(TINY), store, model_choices()))
    page.demo = page.build()
    return page


def values_of(page, updates: dict) -> list:
    """The values of the setting components after updates."""
    values = []
    for component in page.compare.setting_components:
        update = updates.get(component, component.value)
        values.append(
            update.get("value", component.value) if isinstance(update, dict) and "__type__" in update else update
        )
    return values


def test_building_the_page_imports_no_library_that_only_a_run_needs():
    code = BUILD.format(model=TINY, heavy=HEAVY)
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert json.loads(out.stdout.splitlines()[-1]) == []


def test_app_py_is_layout_and_wiring_only():
    text = Path(app.__file__).read_text()
    assert len(text.splitlines()) < 150 and not any(f'"{name}"' in text for name in METHODS)


def test_every_endpoint_is_documented_with_an_example(page):
    endpoints = page.demo.get_api_info()["named_endpoints"]
    assert ENDPOINTS <= {name.removeprefix("/") for name in endpoints}
    for name, info in endpoints.items():
        assert "Example:" in info["description"], name


def test_every_preset_is_a_card_and_the_featured_ones_tell_what_was_measured(monkeypatch):
    monkeypatch.setattr("ui.preset_cards.measured_figures", lambda: {"combined": (2.346, 0.9284)})
    cards = {name: text for text, name in card_choices(TINY)}
    assert set(cards) == {*preset_names(), PLAIN}
    assert cards["combined"].startswith("combined · 2.3× · SSIM .928\n")
    assert all("SSIM" not in text for text, _ in card_choices("another/model"))


@pytest.mark.parametrize("name", preset_names())
def test_a_preset_sets_the_methods_that_it_names(page, name):
    preset = load_preset(name)
    updates = page.compare.load_preset(TINY, name)
    settings = page.compare.settings(TINY, values_of(page, updates))
    installed = {method for method in preset.methods if METHODS[method].is_installed()}
    assert set(settings.candidate["methods"]) == installed
    required = required_settings(preset.methods)
    assert settings.candidate["steps"] == (required.get("steps") or preset.steps or 50)
    if required:  # a student's steps do not stay behind in the slider
        assert "value" not in updates[page.compare.side.steps]
    assert ("without its package" in updates[page.compare.preset_note]) == (installed != set(preset.methods))


def test_a_model_that_cannot_run_here_is_offered_with_the_reason(page, monkeypatch):
    missing = ModelChoice("some/model", "Some model", "it needs a GPU, and this server has none")
    monkeypatch.setattr(page.context, "models", [*page.context.models, missing])
    message = page.compare.load_preset("some/model", "fastercache")[page.compare.message]
    assert missing.label == "Some model (not here)" and "needs a GPU" in message
    assert page.compare.load_preset(TINY, "fastercache")[page.compare.message] == ""


def test_the_plain_card_switches_all_methods_off(page):
    settings = page.compare.settings(TINY, values_of(page, page.compare.load_preset(TINY, PLAIN)))
    assert settings.candidate["methods"] == {} and settings.reference["methods"] == {}


@pytest.mark.parametrize("model, offered", [(TINY, True), ("models/gone", False)])
def test_opening_a_stored_pair_chooses_its_model_or_says_that_it_is_gone(page, model, offered):
    folder = next(pair.folder for pair in recorded_pairs() if pair.name == "fastercache")
    report = json.loads((folder / "run.json").read_text()) | {"model": model}
    run_id = page.context.store.add("me", report, {"a.mp4": b"a", "b.mp4": b"b"})
    for updates in (page.compare.show_stored(run_id), page.compare.show_two(run_id, run_id)):
        assert set(updates) <= set(page.compare.outputs)
        assert updates.get(page.model) == (model if offered else None)
        assert ("not offered here any more" in str(updates[page.compare.message])) is not offered


def test_the_prompt_is_that_of_the_recorded_pair_shown_unless_it_is_the_visitors_own(page):
    first, gpd = (RECORDINGS[name] for name in (recorded_pairs()[0].name, "gpd"))
    assert (page.compare.prompt.value, page.compare.seed.value) == first
    updates = page.compare.choose_preset(None, TINY, "gpd", first.prompt)
    assert (updates[page.compare.prompt], updates[page.compare.seed]) == gpd
    assert page.compare.prompt not in page.compare.choose_preset(None, TINY, "gpd", "a cat")


@pytest.mark.parametrize("methods", [{"gone": {}}, {"stepcache": {}, "disca": {}}], ids=["gone", "refused together"])
def test_a_pair_of_an_earlier_version_is_shown_and_not_repeated(methods, page):
    folder = next(pair.folder for pair in recorded_pairs() if pair.name == "fastercache")
    report = json.loads((folder / "run.json").read_text()) | {"methods": methods}
    run_id = page.context.store.add("me", report, {"a.mp4": b"a", "b.mp4": b"b"})
    for updates in (page.compare.show_stored(run_id), page.compare.show_two(run_id, run_id)):
        assert updates[page.compare.shown] == run_id and page.compare.prompt not in updates
        assert "This result is of an earlier version" in str(updates[page.compare.message])
        assert page.compare.reference.pinned not in updates
    assert "of an earlier version" in str(page.compare.pin_candidate(run_id)[page.compare.message])
    with pytest.raises(AccelError, match="of an earlier version"):
        page.code.code_of(run_id)
    assert "of an earlier version" in str(page.code.show(run_id)[page.code.about])


def test_settings_from_a_link_go_to_the_side_they_are_of(page):
    reference = {"steps": 24, "methods": {"fastercache": {}}}
    run = {"prompt": "a blue ring spins", "seed": 7, "steps": 12, "solver": "euler", "reference": reference}
    updates = page.compare.load_settings(load_preset("asymrnr"), run, TINY)
    settings = page.compare.settings(TINY, values_of(page, updates))
    assert settings.run == {"model": TINY, "prompt": "a blue ring spins", "seed": 7}
    assert settings.candidate["steps"] == 12 and settings.candidate["solver"] == "euler"
    assert settings.reference["methods"] == {"fastercache": {}} and settings.reference["steps"] == 24


def test_without_a_last_candidate_or_a_pinned_result_the_reference_is_refused_in_a_sentence(page):
    for source, sentence in (("last", "no candidate has been generated yet"), ("pinned", "no result is pinned")):
        values = values_of(page, {page.compare.reference.source: source})
        with pytest.raises(AccelError, match=sentence):
            page.compare.settings(TINY, values)


def test_a_changed_parameter_is_listed_and_can_be_set_back(page):
    compare = page.compare
    interval = compare.controls.parameters["fastercache"]["attention_interval"]
    values = values_of(page, {**compare.load_preset(TINY, "fastercache"), interval: 5})
    updates = compare.settings_changed(TINY, "fastercache", *values)
    assert "attention interval 2 → 5" in updates[compare.changed]
    event = gr.EventData(None, {"id": "fastercache.attention_interval"})
    back = compare.reset(event, TINY, "fastercache", *values)
    assert back[interval]["value"] == 2 and back[compare.changed] == ""


def test_what_a_method_decides_is_hidden(page):
    compare, side = page.compare, page.compare.side
    assert all(part.visible for part in (side.steps, side.guidance, side.noise_levels))
    shown = {"fastercache": [True, True, True], "quick": [False, True, False], "gpd": [False, False, False]}
    for preset, expected in shown.items():
        loaded = compare.load_preset(TINY, preset)
        changed = compare.settings_changed(TINY, preset, *values_of(page, loaded))
        for updates in (loaded, changed):
            assert [updates[part]["visible"] for part in (side.steps, side.guidance, side.noise_levels)] == expected


def test_a_solver_that_a_student_has_hidden_counts_as_not_chosen(page):
    values = values_of(page, {**page.compare.load_preset(TINY, "gpd"), page.compare.side.solver: "euler"})
    candidate = page.compare.settings(TINY, values).candidate
    assert (candidate["solver"], candidate["shift"]) == ("default", None)


def test_stop_without_a_run_says_so_and_stops_no_sweep(page):
    sweep = page.context.workers.submit(lambda *_: None, "me")
    tab, other_tab = (gr.Request(session_hash=name) for name in ("tab", "other tab"))
    assert "Nothing is running" in page.compare.runs.stop_pairs(tab) and not sweep.stop.is_set()
    run = page.compare.runs.run_pair(tab, None, [], "me", TINY, "plain", *values_of(page, {}))
    assert page.compare.message in next(run) and [who for _, who, _ in page.compare.runs.jobs] == ["me"]
    assert "Nothing is running" in page.compare.runs.stop_pairs(other_tab)  # of the same visitor
    page.compare.runs.stop_pairs(tab)
    stopped, link = list(run)[-2:]
    assert "Stopped" in stopped[page.compare.message] and not page.compare.runs.jobs
    assert link == {page.code.link: page.code.link_of(None)}  # of the pair shown, as before
    assert not sweep.stop.is_set() and page.context.workers.stop("me") == 1


def test_a_new_visitor_gets_an_id_and_a_known_one_keeps_it(page):
    request = gr.Request(query_params={})
    assert len(page.greet(request, "")[page.visitor]) == 32
    assert page.visitor not in page.greet(request, "known")


@pytest.mark.parametrize("side, sentence", [
    ([], "a side is a JSON object"), ({"speed": 1}, "unknown setting 'speed' of a side"),
    ({"preset": "../../etc/passwd"}, "no preset '../../etc/passwd'"), ({"preset": "x.yaml"}, "no preset 'x.yaml'"),
    ({"changes": "fast"}, "changes is a JSON object"),
    ({"changes": {"gpd.student": "/etc"}}, "gpd.student is for Python"),
])  # fmt: skip
def test_a_wrong_side_over_the_api_is_refused_in_a_sentence(side, sentence):
    with pytest.raises(AccelError, match=sentence):
        side_from(side)


def test_a_side_over_the_api_is_a_preset_with_changes():
    side = side_from({"preset": "fastercache", "changes": {"fastercache.attention_interval": 4}, "steps": 12})
    assert side["steps"] == 12 and side["methods"]["fastercache"]["attention_interval"] == 4
    assert side_from({}) == {"methods": Preset().methods}
    assert load_preset("fastercache").methods["fastercache"]["attention_interval"] == 2  # the preset is as it was


def test_another_model_brings_its_own_cards_and_examples_and_leaves_a_prompt_of_the_visitors(page, tmp_path):
    (tmp_path / "accel.json").write_text("{}")
    model, (toy, real) = str(tmp_path), (example_prompts(read_defaults(model)) for model in (TINY, str(tmp_path)))
    updates = page.compare.switch_model(model, "balanced", toy[0])
    assert updates[page.compare.prompt] == real[0] and real[1] in updates[page.compare.examples]
    assert updates[page.compare.preset]["value"] == "stepcache" and updates[page.compare.preset_note] == ""
    stock, defaults = page.compare.reference.settings, ModelDefaults()
    assert (updates[stock.steps]["value"], updates[stock.guidance]["value"]) == (defaults.steps, defaults.guidance)
    assert not any("SSIM" in text for text, _ in updates[page.compare.preset]["choices"])
    assert page.compare.switch_model(model, "turbo", "a cat")[page.compare.preset]["value"] == "stepcache"
    assert page.compare.switch_model(TINY, "quick", "a cat")[page.compare.preset]["value"] == "quick"
    assert page.compare.prompt not in page.compare.switch_model(model, "balanced", "a cat")


def test_settings_choose_the_card_of_the_preset_that_they_are(page):
    cards = lambda preset: page.compare.load_settings(preset, {}, TINY)[page.compare.preset]
    assert cards(load_preset("stepcache")) == "stepcache" and cards(Preset()) == PLAIN
    assert cards(Preset(methods={"stepcache": {"threshold": 0.33}})) is None


def test_a_slider_grows_for_a_value_above_its_end(page):
    side = page.compare.side
    updates = page.compare.load_settings(Preset(steps=500, guidance=20.0), {}, TINY)
    assert (updates[side.steps]["maximum"], updates[side.guidance]["maximum"]) == (500, 20.0)
    assert page.compare.load_settings(Preset(steps=50), {}, TINY)[side.steps]["maximum"] == 100


def test_a_model_that_nobody_loads_is_not_said_to_be_loading(page):
    estimate = lambda model: page.compare.estimate_text(model, values_of(page, {}))
    assert estimate(TINY) == "The model is being loaded."
    assert estimate("another") == "The model is loaded when you press Run."
    hub = next(choice for choice in page.compare.context.models if choice.reason)
    assert estimate(hub.id) == f"This model cannot run here: {hub.reason}."


def test_a_loaded_model_brings_its_own_steps_and_guidance_but_not_over_those_of_the_visitor(page, monkeypatch):
    mochi = ModelDefaults(steps=64, guidance=4.5)
    monkeypatch.setattr(page.context.workers, "pipeline", lambda model: (None, mochi))
    monkeypatch.setattr(page.context.workers, "is_loading", lambda model: False)
    estimated = []
    monkeypatch.setattr(page.compare, "estimate_text", lambda model, values: estimated.append(values) or "")
    a, b = page.compare.reference.settings, page.compare.side
    first = lambda **query: page.compare.first_estimate(
        SimpleNamespace(query_params=query), TINY, "stepcache", *values_of(page, {a.steps: 20})
    )
    updates = first()
    assert (updates[b.steps], updates[a.guidance], updates[b.guidance]) == (64, 4.5, 4.5) and a.steps not in updates
    assert dict(zip(page.compare.setting_components, estimated[0]))[b.steps] == 64
    assert b.steps not in first(steps="50")  # those of a link stay
    assert page.compare.switch_model("another", "stepcache", "a cat")[a.steps]["value"] == 64


def test_a_preset_brings_its_solver_and_shift(page):
    updates = page.compare.load_settings(Preset(steps=16, solver="dpm++2m", shift=5.0), {}, TINY)
    side = page.compare.settings(TINY, values_of(page, updates)).candidate
    assert side == {"steps": 16, "guidance": 5.0, "solver": "dpm++2m", "shift": 5.0, "methods": {}}
