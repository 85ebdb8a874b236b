"""The History and the Vote tab in a real browser, beside a Compare tab that only tells what it was asked to show."""

from types import SimpleNamespace

import gradio as gr
import pytest
from browser import MARKS, collect_errors
from starlette.responses import FileResponse
from starlette.routing import Route

from accel.runtime.models import TINY
from accel.runtime.paths import ROOT
from ui.context import Context
from ui.history_tab import HistoryTab
from ui.store import Store
from ui.vote_tab import VoteTab

pytestmark = MARKS
VIDEO = next((ROOT / "examples" / "runs").glob("*/a.mp4")).read_bytes()
VIDEOS = "[...document.querySelectorAll('#vote-player video')]"
RUN = {"steps": 50, "guidance": 4.0, "methods": {}}
REPORT = {
    "model": TINY, "prompt": "<img src=x onerror=alert(1)> ${alert(1)} {{7}}", "seed": 1, "height": 64, "width": 64,
    "frames": 17, "fps": 8, **RUN, "methods": {"fastercache": {}}, "reference": RUN, "speedup_denoise": 1.6,
}  # fmt: skip


class CompareStub:
    """Tells what it was asked to show."""

    def __init__(self):
        self.shown = gr.Textbox(elem_id="shown")
        self.outputs, self.shows = [self.shown], []

    def follow(self, event) -> None:
        """Nothing here depends on the settings."""

    def show_stored(self, run_id: str) -> dict:
        return {self.shown: run_id}

    def show_two(self, first: str, second: str) -> dict:
        return {self.shown: f"{first} and {second}"}


def build(context: Context) -> tuple[gr.Blocks, VoteTab]:
    with gr.Blocks() as demo:
        page = SimpleNamespace(visitor=gr.BrowserState("me", storage_key="visitor", secret="secret"))
        page.compare = CompareStub()
        with gr.Tab("Start"):
            gr.HTML("start")
        with gr.Tab("History"):
            page.history = HistoryTab(context)
        with gr.Tab("Vote"):
            page.vote = VoteTab(context)
        for tab in (page.history, page.vote):
            tab.wire(page)
            tab.add_endpoints()
    return demo, page.vote


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    store = Store(tmp_path_factory.mktemp("data"))
    demo, vote = build(Context(TINY, None, store, owner_key="key"))
    video = lambda request: FileResponse(store.find(request.path_params["run_id"]).folder / "b.mp4")
    routes = [Route("/runs/{run_id}/b.mp4", video), *vote.routes()]
    demo.launch(prevent_thread_lock=True, quiet=True, ssr_mode=False, app_kwargs={"routes": routes})
    yield SimpleNamespace(store=store, url=demo.local_url)
    demo.close()


@pytest.fixture
def page(browser, server):
    """A visitor with three stored pairs; another visitor has one. There must be no error in the console."""
    server.store.delete_all(None)
    for visitor in ("me", "other", "me", "me"):
        server.store.add(visitor, REPORT, {"a.mp4": VIDEO, "b.mp4": VIDEO})
    context = browser.new_context(viewport={"width": 390, "height": 844}, reduced_motion="reduce")
    page = context.new_page()
    errors = collect_errors(page)
    page.goto(server.url)
    yield page
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    context.close()
    assert errors == []


def open_tab(page, name: str) -> None:
    page.get_by_role("tab", name=name).click()


def test_results_are_selected_by_mouse_and_keyboard_and_shown_in_compare(page, server):
    newest, second, _ = [stored.id for stored in server.store.list("me")]
    open_tab(page, "History")
    tiles = page.locator(".tile")
    tiles.first.wait_for()
    assert tiles.count() == 3 and "<img src=x onerror=alert(1)> ${alert(1)} {{7}}" in tiles.first.inner_text()
    assert page.is_disabled("#history-open") and not page.is_visible(".tile video >> nth=0")
    tiles.nth(0).click()
    page.click("#history-open:enabled")
    page.wait_for_function(f"document.querySelector('#shown textarea').value === '{newest}'")
    tiles.nth(1).focus()
    page.keyboard.press("Enter")
    page.wait_for_selector("text=Both have the same settings")
    page.click("#history-compare:enabled")
    page.wait_for_function(f"document.querySelector('#shown textarea').value === '{second} and {newest}'")
    tiles.nth(1).click()
    page.wait_for_selector("#history-compare:disabled")


def test_quick_clicks_are_all_counted_and_outlast_a_new_gallery(page, server):
    open_tab(page, "History")
    page.locator(".tile").nth(2).wait_for()
    page.evaluate("for (const tile of document.querySelectorAll('.tile')) tile.click()")
    page.wait_for_selector("text=Delete 3 results")
    server.store.add("me", REPORT, {"a.mp4": VIDEO, "b.mp4": VIDEO})
    open_tab(page, "Start")
    open_tab(page, "History")
    page.locator(".tile").nth(3).wait_for()
    pressed = [tile.get_attribute("aria-pressed") for tile in page.locator(".tile").all()]
    assert pressed == ["false", "true", "true", "true"] and page.is_visible("text=Delete 3 results")


def test_the_selected_results_or_after_a_question_all_are_deleted(page, server):
    open_tab(page, "History")
    tiles = page.locator(".tile")
    tiles.nth(2).click()
    page.click("#history-delete:enabled")
    page.wait_for_selector("text=1 result deleted.")
    assert tiles.count() == 2 and server.store.count("me") == 2
    page.click("#history-delete-all")
    page.click("#history-no")
    page.wait_for_selector("#history-yes", state="hidden")
    page.click("#history-delete-all")
    page.click("#history-yes")
    page.wait_for_selector("text=No results yet")
    assert [stored.visitor for stored in server.store.list(None)] == ["other"]


def test_the_owner_sees_all_results(page, server):
    for key, count in (("wrong", 3), ("key", 4)):
        page.goto(f"{server.url}?owner={key}")
        open_tab(page, "History")
        page.locator(".tile").first.wait_for()
        assert page.locator(".tile").count() == count


def test_a_blind_vote_is_counted_and_told_and_the_next_pair_follows(page, server):
    before = len(server.store.votes())
    open_tab(page, "Vote")
    page.wait_for_function(f"{VIDEOS}.filter((v) => v.readyState > 1).length === 2")
    assert "plain," not in page.inner_text("#vote-player") and "plain," not in page.inner_text("#vote-question")
    source = page.evaluate(f"{VIDEOS}[0].getAttribute('src')")
    page.click("#vote-left")
    page.wait_for_selector("text=You preferred A.")
    assert "plain, 50 steps" in page.inner_text("#vote-player") and len(server.store.votes()) == before + 1
    page.click("#vote-next")
    page.wait_for_function(f"{VIDEOS}[0].getAttribute('src') !== '{source}'")
    page.wait_for_selector("#vote-right")
    assert "plain," not in page.inner_text("#vote-player")
