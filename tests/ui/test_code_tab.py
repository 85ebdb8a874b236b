"""The Code tab: which pair it shows, and what it does with presets and links."""

import json
from types import SimpleNamespace
from urllib.parse import parse_qsl

import gradio as gr
import pytest
from starlette.applications import Starlette
from starlette.testclient import TestClient

from accel.errors import AccelError
from accel.runtime.models import TINY
from accel.runtime.repeat import preset_of
from ui.code_tab import RECORDED, CodeTab, recorded_file
from ui.recorded import recorded_pairs
from ui.share import link_query

RUN_ID = "0" * 32
EVIL = "</div><script>alert(1)</script>"


class Compare:
    """As much of the Compare tab as the Code tab uses; `loaded` holds the settings that it was given."""

    def __init__(self):
        self.shown, self.message, self.preset = gr.State(None), gr.HTML(), gr.Radio()
        self.loaded, self.shows = [], []

    @property
    def outputs(self) -> list:
        return [self.message]

    def load_settings(self, preset, run, model) -> dict:
        self.loaded.append((preset, run, model))
        return {self.preset: preset_of(preset.methods)}

    def follow(self, event) -> None:
        """Nothing here depends on the settings."""

    def views_of(self, model, name) -> dict:
        return {"views": (model, name)}

    def show_recorded(self, pair) -> dict:
        return {"recorded": pair.name}

    def stock(self, model) -> dict:
        return {"stock": model}


@pytest.fixture
def report() -> dict:
    report = json.loads((RECORDED / "fastercache" / "run.json").read_text())
    return {**report, "methods": {"fastercache": {"attention_interval": 3}}, "prompt": EVIL}


@pytest.fixture
def tab(report) -> CodeTab:
    store = SimpleNamespace(find=lambda run_id: SimpleNamespace(report=report) if run_id == RUN_ID else None)
    reasons = {TINY: "", "a/b": "", "c/d": "It needs a GPU"}
    models = [SimpleNamespace(id=model, reason=reason) for model, reason in reasons.items()]
    with gr.Blocks():
        tab = CodeTab(SimpleNamespace(model=TINY, store=store, models=models))
        page = SimpleNamespace(compare=Compare(), tabs=gr.Tabs(), model=gr.Dropdown([*reasons]))
        tab.wire(page)
    return tab


def shown(tab: CodeTab, name: str | None) -> dict[str, str]:
    """{id of a component: its value}"""
    return {component.elem_id: str(value) for component, value in tab.show(name).items()}


def request(**query) -> SimpleNamespace:
    return SimpleNamespace(query_params=query)


def message(tab: CodeTab, update: dict) -> str:
    return str(update[tab.page.compare.message])


def test_a_stored_pair_is_shown_with_links_to_its_own_files(tab):
    values = shown(tab, RUN_ID)
    assert "attention_interval=3" in values["code"] and "--set fastercache.attention_interval=3" in values["command"]
    assert "attention_interval: 3" in values["preset-yaml"] and values["share-link"].startswith("?p=")
    assert f'href="runs/{RUN_ID}/report.zip"' in values["downloads"]


def test_the_first_recorded_pair_is_shown_before_anything_was_generated(tab):
    assert shown(tab, None) == shown(tab, "stepcache")
    assert 'href="recorded/stepcache/report.zip"' in shown(tab, None)["downloads"]


@pytest.mark.parametrize("name", ["1" * 32, "../ring", "/etc", "ring/..", "RING", EVIL])
def test_a_pair_that_is_not_there_is_told(tab, name):
    values = shown(tab, name)
    assert "no longer stored" in values["code-about"] and values["code"] == values["downloads"] == ""


def test_a_name_is_never_a_path():
    assert recorded_file("fastercache") == RECORDED / "fastercache" / "run.json"
    assert recorded_file("..") is None and recorded_file("../runs/fastercache") is None


def test_the_prompt_is_escaped(tab):
    values = shown(tab, RUN_ID)
    assert "<script>" not in values["code-about"] + values["downloads"]


def test_a_preset_file_sets_the_compare_tab(tab):
    tab.use_preset(b"methods: {fastercache: {attention_interval: 3}}", "a/b")
    (preset, run, model), *_ = tab.page.compare.loaded
    assert preset.methods == {"fastercache": {"attention_interval": 3}} and (run, model) == ({}, "a/b")


def test_a_wrong_preset_file_is_refused_and_changes_nothing(tab):
    update = tab.use_preset("methods: {fastercache: {speed: 9}}", TINY)
    assert list(update) == [tab.message] and not tab.page.compare.loaded
    assert "fastercache.speed" in update[tab.message]["value"]


def test_settings_of_the_address_are_loaded(tab):
    update = tab.settings_of_url(request(preset="gpd", seed="42", prompt="a red star"))
    ((preset, run, model),) = tab.page.compare.loaded
    assert (
        list(preset.methods) == ["gpd"] and run == {"seed": 42, "prompt": "a red star"} and model == tab.context.model
    )
    assert "those of the link" in message(tab, update)


def test_a_page_that_loads_anew_shows_the_recorded_pair_of_its_address(tab):
    pair = recorded_pairs()[1]
    update = tab.settings_of_url(request(**dict(parse_qsl(link_query(pair.report)))))
    assert update["recorded"] == pair.name and update[tab.link] == f"?{link_query(pair.report)}"
    assert "recorded" not in tab.settings_of_url(request(preset="gpd", seed="42"))


def test_a_link_of_another_model_chooses_it_with_its_cards_and_examples(tab):
    update = tab.settings_of_url(request(model="a/b"))
    assert update["views"] == ("a/b", None) and update["stock"] == "a/b"
    assert update[tab.page.model] == "a/b" and tab.page.compare.loaded[0][2] == "a/b"


@pytest.mark.parametrize("model, reason", [("c/d", "It needs a GPU"), ("e/f", "does not offer the model")])
def test_a_link_of_a_model_that_cannot_be_used_says_why(tab, model, reason):
    update = tab.settings_of_url(request(model=model))
    assert reason in message(tab, update) and tab.page.model not in update and not tab.page.compare.loaded


def test_an_address_without_settings_changes_nothing(tab):
    update = tab.settings_of_url(request(__theme="dark"))
    assert update == {tab.page.compare.message: gr.skip()} and not tab.page.compare.loaded


def test_a_wrong_address_is_told_and_escaped(tab):
    text = message(tab, tab.settings_of_url(request(preset=EVIL)))
    assert "The link was not used: no preset" in text and "<script>" not in text and not tab.page.compare.loaded


def test_the_endpoint_gives_the_same_text(tab):
    values = shown(tab, RUN_ID)
    assert tab.code_of(RUN_ID) == {"python": values["code"], "command": values["command"],
                                   "preset": values["preset-yaml"], "link": values["share-link"]}  # fmt: skip
    with pytest.raises(AccelError, match="no longer stored"):
        tab.code_of("1" * 32)


def test_the_preset_file_of_a_pair_is_served_under_its_address(tab):
    client = TestClient(Starlette(routes=tab.routes()))
    served = client.get(f"/runs/{RUN_ID}/preset.yaml")
    assert served.text == shown(tab, RUN_ID)["preset-yaml"] and "attachment" in served.headers["content-disposition"]
    assert client.get("/recorded/fastercache/preset.yaml").text == shown(tab, "fastercache")["preset-yaml"]


@pytest.mark.parametrize(
    "path", ["runs/fastercache", f"recorded/{RUN_ID}", "runs/" + "1" * 32, "recorded/none", "recorded/.."]
)
def test_a_preset_file_is_served_under_no_other_address(tab, path):
    assert TestClient(Starlette(routes=tab.routes())).get(f"/{path}/preset.yaml").status_code == 404
