"""The Code and Results tabs, the step map and the report in a real browser: copying, uploading, sorting, hovering."""

import json
import zipfile
from types import SimpleNamespace

import gradio as gr
import pytest
from browser import MARKS, collect_errors

from accel.evaluation.pair_report import write_report
from accel.runtime.models import TINY
from accel.runtime.paths import ROOT
from ui.code_tab import CodeTab
from ui.recorded import RECORDINGS
from ui.results_tab import LABEL, ResultsTab
from ui.timeline import READ_OUT, timeline

pytestmark = MARKS
RECORDED = ROOT / "examples" / "runs" / "fastercache"
REPORT = json.loads((RECORDED / "run.json").read_text())


class Compare:
    """As much of the Compare tab as the other tabs use; it shows the settings that it was given."""

    def __init__(self, tabs: gr.Tabs):
        self.shown, self.message, self.given = gr.State(None), gr.HTML(elem_id="message"), gr.HTML(elem_id="given")
        self.preset = gr.State(None)
        self.outputs, self.shows = [tabs, self.message, self.given, self.preset, self.shown], []
        gr.HTML(timeline(REPORT["trace"]), js_on_load=READ_OUT, elem_id="timeline")

    def load_settings(self, preset, run, model) -> dict:
        return {self.given: f"{list(preset.methods)} {run.get('seed')}", self.preset: None}

    def views_of(self, model, name) -> dict:
        """Nothing here depends on the model."""
        return {}

    stock = lambda self, model: {}
    show_recorded = lambda self, pair: {self.shown: pair.name}

    def follow(self, event) -> None:
        """Nothing here depends on the settings."""


@pytest.fixture(scope="module")
def url():
    context = SimpleNamespace(model=TINY, models=[SimpleNamespace(id=TINY, reason="")], store=None)
    page = SimpleNamespace()
    with gr.Blocks() as demo:
        page.model = gr.State(TINY)
        with gr.Tabs(selected="compare") as page.tabs:
            with gr.Tab("Compare", id="compare"):
                page.compare = Compare(page.tabs)
                page.compare.outputs.append(page.model)
            with gr.Tab(LABEL, id="results"):
                results = ResultsTab(context)
            with gr.Tab("Code", id="code"):
                code = CodeTab(context)
        results.wire(page)
        code.wire(page)
        demo.load(code.settings_of_url, None, [*page.compare.outputs, *code.views], queue=False)
    demo.launch(quiet=True, prevent_thread_lock=True, ssr_mode=False)
    yield demo.local_url
    demo.close()


@pytest.fixture(scope="module")
def context(browser):
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    yield context
    context.close()


@pytest.fixture
def page(context, url):
    """A visitor's page; it must end without an error in the console."""
    page = context.new_page()
    errors = collect_errors(page)
    page.goto(url)
    page.wait_for_selector("#timeline rect", timeout=30_000)
    yield page
    page.close()
    assert not errors


def test_the_copied_link_restores_the_settings(page, url):
    page.get_by_role("tab", name="Code").click()
    page.wait_for_function("document.querySelector('#share-link textarea')?.value.startsWith('?')")
    page.bring_to_front()  # the clipboard is for the page in front
    page.wait_for_timeout(1000)  # a click before Gradio has bound its events is lost
    page.click("#copy-link")
    page.wait_for_function("document.querySelector('#share-link textarea').value.startsWith('http')")
    link = page.evaluate("navigator.clipboard.readText()")
    assert link == page.input_value("#share-link textarea") and link.startswith(f"{url}?preset=stepcache")
    page.goto(link)
    page.wait_for_selector(f"#given >> text=['stepcache'] {RECORDINGS['stepcache'].seed}", timeout=30_000)


def test_text_in_the_address_never_becomes_html(page, url):
    page.goto(f"{url}?preset=%3Cimg%20src%3Dx%20onerror%3Dalert(1)%3E")
    page.wait_for_selector("#message >> text=The link was not used: no preset '<img", timeout=30_000)
    assert page.locator("#message img").count() == 0


def test_a_preset_file_is_uploaded_or_refused(page, tmp_path):
    page.get_by_role("tab", name="Code").click()
    for name, text in (("wrong", "methods: {gpd: {steps: 7}}"), ("right", "methods: {gpd: {steps: 6}}")):
        (tmp_path / f"{name}.yaml").write_text(text)
        with page.expect_file_chooser() as chooser:
            page.click("#upload-preset")
        chooser.value.set_files(tmp_path / f"{name}.yaml")
        if name == "wrong":
            page.wait_for_selector("#code-message >> text=gpd.steps = 7 is not allowed", timeout=30_000)
    page.wait_for_selector("#given >> text=['gpd']", timeout=30_000)


def test_a_preset_is_downloaded_as_a_file(page):
    page.get_by_role("tab", name="Code").click()
    with page.expect_download() as download:
        page.click("#downloads a[download='preset.yaml']")
    assert "methods:\n  stepcache: {}" in download.value.path().read_text()


def test_a_table_of_results_is_read_when_it_is_opened_and_sorted_by_keyboard(page):
    assert page.locator("#results-table tr").count() == 0
    page.get_by_role("tab", name=LABEL).click()
    page.wait_for_selector("#results-table tbody tr", timeout=30_000)
    first = page.locator("#results-table tbody th").first
    assert first.inner_text() == "baseline"
    page.locator("#results-table thead button", has_text="speed-up").press("Enter")
    page.wait_for_selector("#results-table [aria-sort=descending]")
    assert first.inner_text() == "turbo" and page.locator("#results-plot path.mark").count() == 11


def test_the_cell_under_the_pointer_is_read_out(page):
    page.hover("#timeline rect[data-action=reuse] >> nth=0")
    page.wait_for_selector("#timeline .read-out >> text=attention reused")
    assert "step" in page.inner_text("#timeline .read-out")


@pytest.mark.parametrize("tab", ["Compare", LABEL, "Code"])
def test_every_tab_fits_a_phone(page, tab):
    page.get_by_role("tab", name=tab).click()
    page.set_viewport_size({"width": 390, "height": 900})
    page.wait_for_function("document.documentElement.scrollWidth <= 390", timeout=10_000)
    assert page.get_by_role("tab", name=tab).get_attribute("aria-selected") == "true"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_report_opens_without_a_network_and_is_legible(context, tmp_path, scheme):
    write_report(RECORDED, tmp_path / "report.zip")
    with zipfile.ZipFile(tmp_path / "report.zip") as archive:
        archive.extractall(tmp_path)
    page, requests = context.new_page(), []
    page.emulate_media(color_scheme=scheme)
    page.on("request", lambda request: requests.append(request.url))
    page.goto(f"file://{tmp_path}/index.html")
    page.wait_for_function("[...document.querySelectorAll('video')].every((video) => video.readyState > 0)")
    assert all(address.startswith(f"file://{tmp_path}/") for address in requests)
    text, ground = page.evaluate("['color', 'backgroundColor'].map((name) => getComputedStyle(document.body)[name])")
    page.close()
    assert (ground if scheme == "light" else text) == "rgb(255, 255, 255)"
