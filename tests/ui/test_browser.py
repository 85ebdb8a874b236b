"""The whole page in a real browser: first visit, a live pair, any pair, Stop, knobs, tabs, links, phone, dark, keys."""

import json
import re
import zipfile
from contextlib import contextmanager
from io import BytesIO

import httpx
import pytest
from browser import MARKS, collect_errors

pytestmark = MARKS
BLOCKS = 8  # of the shipped model
LIVE = "#live .live-panes"
CONTRAST = """(selectors) => {
    const pen = new OffscreenCanvas(1, 1).getContext('2d', {willReadFrequently: true});
    const rgba = (colour) => {
        pen.clearRect(0, 0, 1, 1);
        pen.fillStyle = colour;
        pen.fillRect(0, 0, 1, 1);
        return [...pen.getImageData(0, 0, 1, 1).data];
    };
    const linear = (v) => v / 255 <= .03928 ? v / 255 / 12.92 : ((v / 255 + .055) / 1.055) ** 2.4;
    const luminance = ([r, g, b]) => .2126 * linear(r) + .7152 * linear(g) + .0722 * linear(b);
    const behind = (element) => {
        for (let e = element; e; e = e.parentElement) {
            const colour = rgba(getComputedStyle(e).backgroundColor);
            if (colour[3] > 250) return colour;
        }
        return [255, 255, 255, 255];
    };
    const ratio = (e) => {
        const style = getComputedStyle(e), own = e instanceof SVGElement ? style.fill : style.color;
        const [low, high] = [luminance(rgba(own)), luminance(behind(e))].sort((a, b) => a - b);
        return [e.textContent.trim().slice(0, 30), (high + .05) / (low + .05)];
    };
    const visible = (e) => e.checkVisibility() && e.textContent.trim() && !e.closest(':disabled');
    return selectors.flatMap((s) => [...document.querySelectorAll(s)].filter(visible).map(ratio));
}"""
TEXTS = ["#title small", "#preset span", "#headline span", "#headline b", "#metric-cards span", "#metric-cards b",
         ".note", ".examples button", "#estimate", "#settings label span", "#settings h2", "#timeline text",
         "#player figcaption", "#player button", "#run", "#stop", "[role=tab]", ".base"]  # fmt: skip


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    import app
    from accel.runtime import models
    from ui.server import Options, launch

    small = {"height": 64, "width": 64, "frames": 9}  # of the videos that are generated here
    stock = models.model_defaults
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "model_defaults", lambda *given: stock(*given).model_copy(update=small))
        server = launch(app.Page, Options(data=tmp_path_factory.mktemp("data"), port=None), quiet=True)
        yield server
        server.close()


@contextmanager
def visit(browser, server, query: str = "", width: int = 1280, height: int = 900, motion: str = "reduce"):
    """A new visitor's page, which must end without an error; with reduced motion no video plays by itself."""
    context = browser.new_context(viewport={"width": width, "height": height}, reduced_motion=motion)
    page = context.new_page()
    errors = collect_errors(page)
    page.goto(server.url + query)
    page.wait_for_selector("#player video", state="attached", timeout=60_000)
    page.wait_for_function("document.querySelector('#preset input')")
    yield page
    context.close()
    assert errors == []


@pytest.fixture(scope="module")
def shared_page(browser, server):
    """One visitor's page for all tests that set everything they need of it."""
    with visit(browser, server) as page:
        yield page


@pytest.fixture
def page(shared_page):
    """The shared page with its Compare tab open."""
    open_tab(shared_page, "Compare")
    return shared_page


def set_number(page, name: str, value) -> None:
    box = page.locator(f"#{name} input[type=number]")
    box.fill(str(value))
    box.press("Tab")


def set_steps(page, reference: int, candidate: int) -> None:
    set_number(page, "steps-a", reference)
    set_number(page, "steps-b", candidate)


def choose_preset(page, name: str, *active: str) -> None:
    """Choose a card and wait until the switches of the methods that it uses are on, and no others."""
    page.locator(f"#preset label:has(input[value={name}])").click()
    on = "[...document.querySelectorAll('[id^=use-] input:checked')].map(input => input.closest('[id^=use-]').id)"
    page.wait_for_function(f"wanted => {on}.sort().join() === wanted", arg=",".join(sorted(f"use-{m}" for m in active)))


def run_pair(page) -> None:
    """Press Run and wait until a new pair is shown."""
    page.click("#run")
    page.wait_for_selector(LIVE, timeout=60_000)
    page.wait_for_selector(LIVE, state="detached", timeout=120_000)
    page.wait_for_selector("#run:not([disabled])")


def open_tab(page, name: str) -> None:
    page.get_by_role("tab", name=name, exact=True).click()


def test_the_first_screen_has_prompt_preset_run_both_videos_and_figures(browser, server):
    with visit(browser, server) as page:
        for element in ("#prompt", "#preset", "#run", "#headline .figure >> nth=0", "#headline .figure >> nth=4"):
            box = page.locator(element).bounding_box()
            assert (box["y"] if element == "#preset" else box["y"] + box["height"]) <= 900, element  # it may scroll
        for box in [page.locator("#player video").nth(i).bounding_box() for i in range(2)]:
            assert box["y"] + box["height"] <= 900 and box["width"] >= 340


def test_a_recorded_race_runs_before_anything_is_computed(browser, server):
    with visit(browser, server, motion="no-preference") as page:
        assert "Recorded pair" in page.inner_text("#verdict")
        page.wait_for_selector("#player .player[data-mode=race]", timeout=10_000)
        page.wait_for_function(
            "[...document.querySelectorAll('#player .clock')].some((c) => parseFloat(c.innerText) > 0.2)"
        )
        assert page.locator("#timeline rect").count() > 100


def test_the_page_fits_a_phone_with_videos_first_and_run_in_reach(browser, server):
    with visit(browser, server, width=390, height=844) as page:
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        top = {
            name: page.locator(name).bounding_box()["y"] for name in ("#player", "#headline", "#prompt", "#settings")
        }
        assert sorted(top, key=top.get) == ["#player", "#headline", "#prompt", "#settings"]
        run = page.locator("#run").bounding_box()
        assert run["height"] >= 44 and 700 < run["y"] < 844


@pytest.mark.parametrize("theme", ["light", pytest.param("dark", marks=pytest.mark.slow)])
def test_every_text_is_legible(browser, server, theme):
    with visit(browser, server, f"?__theme={theme}") as page:
        weak = {text: ratio for text, ratio in page.evaluate(CONTRAST, TEXTS) if ratio < 4.5}
        assert weak == {}


@pytest.mark.slow
def test_every_control_has_a_name(browser, server):
    with visit(browser, server) as page:
        controls = page.locator(
            "#settings input:visible, #stage input:visible, #stage textarea:visible, #stage button:visible"
        )
        names = [control.evaluate("(e) => e.ariaLabel || e.labels?.[0]?.innerText || e.innerText || e.title || e.name")
                 for control in controls.all()]  # fmt: skip
        assert all(names)


@pytest.mark.slow
def test_the_page_is_used_by_keyboard_alone(browser, server):
    with visit(browser, server) as page:
        page.wait_for_function("document.querySelector('#estimate').innerText")  # events are bound by then
        page.locator("#preset input[value=stepcache]").focus()
        page.keyboard.press("Tab")  # Gradio's radio buttons are a stop each
        page.keyboard.press("Space")
        page.wait_for_function("document.querySelector('#preset input[value=fastercache]').checked")
        page.wait_for_function("document.querySelector('#use-fastercache input').checked")
        set_steps(page, 2, 2)
        page.locator("#prompt textarea").focus()
        page.keyboard.press("Tab")
        page.keyboard.press("Tab")
        focused = page.evaluate("[document.activeElement.id, getComputedStyle(document.activeElement).outlineStyle]")
        assert focused == ["run", "solid"]
        page.keyboard.press("Enter")
        page.wait_for_selector(LIVE, timeout=60_000)
        page.wait_for_selector(LIVE, state="detached", timeout=120_000)
        assert "fastercache, 2 steps" in page.inner_text("#player")


def test_a_live_pair_shows_previews_videos_figures_and_map_and_its_reference_is_kept(page):
    choose_preset(page, "fastercache", "fastercache")
    set_steps(page, 20, 10)
    page.fill("#prompt textarea", "a large green cross orbits slowly over a dotted brown background")
    page.click("#run")
    page.wait_for_selector(".live-pane.side-a img", timeout=60_000)
    assert page.locator(".live-pane.side-a").bounding_box()["width"] > 300 and not page.is_visible("#player")
    page.wait_for_function("document.querySelector('.live-text').innerText.includes('ms/step')")
    page.wait_for_selector(LIVE, state="detached", timeout=120_000)
    text = page.inner_text("#headline")
    assert "as fast" in text and "of the work" in text and "PSNR" in text and "VMAF" in text
    assert re.match(r"FasterCache (was|took) .* of denoising", page.inner_text("#verdict"))
    assert page.locator("#timeline [data-action=reuse]").count() > 0
    page.wait_for_function("document.querySelector('#estimate').innerText.includes('generated before')")


@pytest.mark.slow
def test_earlier_candidates_stay_in_the_player_if_asked_for(page):
    choose_preset(page, "plain")
    set_steps(page, 4, 3)
    page.check("#keep input")
    run_pair(page)
    set_number(page, "steps-b", 2)
    run_pair(page)
    page.wait_for_function("document.querySelectorAll('#player video').length >= 3")
    text = page.inner_text("#player")
    assert "plain, 4 steps" in text and "plain, 3 steps" in text and "plain, 2 steps" in text
    page.uncheck("#keep input")


@pytest.mark.slow
def test_any_result_can_be_pinned_as_the_reference(page):
    choose_preset(page, "plain")
    set_steps(page, 4, 2)
    page.fill("#prompt textarea", "a small blue ring spins slowly over a plain black background")
    run_pair(page)
    page.click("#pin")
    page.wait_for_selector("#message >> text=Pinned: plain, 2 steps")
    set_number(page, "steps-b", 3)
    run_pair(page)
    assert "plain, 2 steps" in page.inner_text("#player figcaption >> nth=0")
    choose_source(page, "A preset")
    page.wait_for_selector("#reference-preset")
    choose_source(page, "The stock pipeline")


def choose_source(page, name: str) -> None:
    page.locator("#reference-source label", has_text=name).click()


@pytest.mark.slow
def test_identical_videos_are_called_identical(page):
    choose_preset(page, "plain")
    set_steps(page, 2, 2)
    run_pair(page)
    assert "identical" in page.inner_text("#headline")


@pytest.mark.slow
def test_a_method_that_did_nothing_says_why(page):
    choose_preset(page, "fastercache", "fastercache")
    set_steps(page, 3, 3)
    run_pair(page)
    assert "saved nothing, because" in page.inner_text("#verdict")


def test_stop_ends_the_run_within_a_step_and_keeps_the_last_pair(page):
    shown = page.inner_text("#headline"), page.inner_text("#player figcaption >> nth=1")
    choose_preset(page, "plain")
    set_steps(page, 100, 100)
    page.click("#run")
    page.wait_for_selector(".live-text >> text=step", timeout=60_000)
    page.click("#stop")
    page.wait_for_selector("#message >> text=Stopped", timeout=10_000)
    page.wait_for_selector(LIVE, state="detached")
    assert (page.inner_text("#headline"), page.inner_text("#player figcaption >> nth=1")) == shown
    set_steps(page, 2, 2)


def test_a_card_that_is_chosen_during_a_run_shows_its_recorded_pair_beside_it(browser, server):
    with visit(browser, server) as page:
        choose_preset(page, "plain")
        set_steps(page, 100, 100)
        page.click("#run")
        page.wait_for_selector(".live-text >> text=step", timeout=60_000)
        assert not page.is_visible("#player")
        choose_preset(page, "gpd", "gpd")
        page.wait_for_selector("#player >> text=gpd")
        page.wait_for_selector(".live-text >> text=step")
        page.click("#stop")
        page.wait_for_selector(LIVE, state="detached")
        assert page.is_disabled("#stop") and page.is_visible("#player")


def test_a_number_that_is_typed_out_of_range_is_estimated_as_the_end_that_the_box_then_shows(page):
    choose_preset(page, "plain")
    estimate = "document.querySelector('#estimate').innerText"
    set_number(page, "steps-b", 100)
    page.wait_for_function(f"/^A: .* B: about .*denoising$/.test({estimate})")
    of_the_end = page.inner_text("#estimate")
    set_number(page, "steps-b", 1)
    page.wait_for_function(f"before => {estimate} !== before", arg=of_the_end)
    set_number(page, "steps-b", 150)
    page.wait_for_function(f"before => {estimate} === before", arg=of_the_end)
    assert page.input_value("#steps-b input[type=number]") == "100"


def test_only_the_knobs_of_active_methods_are_shown_and_a_changed_one_can_be_set_back(page):
    choose_preset(page, "fastercache", "fastercache")
    page.wait_for_selector("#knobs-fastercache")
    page.wait_for_selector("#knobs-asymrnr", state="detached")
    set_number(page, "fastercache-attention_interval", 5)
    page.wait_for_selector("#fastercache-attention_interval.changed")
    page.click("#changed button[data-id='fastercache.attention_interval']")
    page.wait_for_selector("#fastercache-attention_interval:not(.changed)")
    assert page.input_value("#fastercache-attention_interval input[type=number]") == "2"
    assert page.locator("#changed button").count() == 0
    page.check("#use-asymrnr input")
    page.wait_for_selector("#knobs-asymrnr")
    page.uncheck("#use-asymrnr input")


def test_refused_input_is_explained_and_nothing_is_lost(page):
    page.fill("#prompt textarea", "a red dragon spins")
    page.fill("#seed input", "1.5")
    page.click("#run")
    page.wait_for_selector("#message .bad >> text=seed = 1.5", timeout=30_000)
    assert page.locator("#player video").count() >= 2
    page.fill("#seed input", "1")
    page.fill("#prompt textarea", "a red ring spins")


@pytest.mark.slow
def test_words_that_the_model_does_not_know_are_named_and_never_become_html(page):
    choose_preset(page, "plain")
    set_steps(page, 2, 2)
    page.fill("#prompt textarea", "a red dragon spins <img src=x onerror=alert(1)>")
    run_pair(page)
    assert "does not know: dragon" in page.inner_text("#message")
    assert page.locator("#message img").count() == 0
    page.fill("#prompt textarea", "a red ring spins")


@pytest.mark.slow
def test_a_student_runs_in_its_own_steps_and_its_predicted_steps_are_on_the_map(page):
    choose_preset(page, "disca", "meanflow", "disca")
    set_steps(page, 2, 2)
    run_pair(page)
    assert "meanflow + disca, 20 steps" in page.inner_text("#player")
    assert page.locator("#timeline [data-action=predict]").count() >= BLOCKS * 12  # predicted steps
    page.uncheck("#use-meanflow input")
    page.click("#run")
    page.wait_for_selector("#message >> text=put the meanflow that it was trained for before disca", timeout=60_000)


@pytest.mark.slow
def test_the_race_of_a_live_pair_can_be_replayed(page):
    choose_preset(page, "fastercache", "fastercache")
    set_steps(page, 2, 2)
    run_pair(page)
    page.click("#player button[data-mode=race]")
    page.wait_for_selector("#player .clock:visible")
    assert page.locator("#player .clock:visible").count() == 2
    page.click("#player button[data-mode=side]")


@pytest.mark.slow
def test_a_stored_pair_is_opened_from_the_history_with_its_settings(page):
    choose_preset(page, "fastercache", "fastercache")
    set_steps(page, 2, 7)
    page.fill("#prompt textarea", "a large pink triangle grows slowly over a checked gray background")
    run_pair(page)
    choose_preset(page, "plain")
    page.fill("#prompt textarea", "something else")
    open_tab(page, "History")
    page.locator(".tile").first.click()
    page.click("#history-open")
    page.wait_for_selector("#message >> text=from the history")
    assert page.input_value("#prompt textarea").startswith("a large pink triangle")
    assert page.input_value("#steps-b input[type=number]") == "7" and page.is_checked("#use-fastercache input")
    open_tab(page, "Code")
    page.wait_for_function("document.querySelector('#code').innerText.includes('num_inference_steps=7')")


def test_a_sweep_fills_its_grid_and_a_point_of_its_plot_opens_a_pair(page):
    open_tab(page, "Compare")
    choose_preset(page, "stepcache", "stepcache")
    set_number(page, "steps-a", 3)
    set_number(page, "steps-b", 4)
    open_tab(page, "Sweep")
    page.uncheck("#sweep-plain input")
    page.fill("#sweep-values-first :is(input, textarea)", "0.1,0.3")
    page.click("#sweep-start")
    page.wait_for_function("document.querySelectorAll('#sweep-grid video').length === 2", timeout=120_000)
    page.locator("#sweep-plot [data-id]").first.click()
    page.wait_for_selector("#message >> text=from the history", timeout=30_000)
    assert page.is_checked("#use-stepcache input") and not page.is_checked("#use-fastercache input")


def test_the_code_tab_and_the_address_are_of_the_recorded_pair_that_a_card_shows(browser, server):
    with visit(browser, server, "?__theme=dark") as page:
        choose_preset(page, "fastercache", "fastercache")
        page.wait_for_url("**/?preset=fastercache&*__theme=dark")
        open_tab(page, "Code")
        page.wait_for_function("document.querySelector('#code').innerText.includes('fastercache')")
        page.reload()
        page.wait_for_selector("#message >> text=settings are those of the link")
        assert page.is_checked("#use-fastercache input")


@pytest.mark.slow
def test_the_code_tab_and_the_report_are_of_the_pair_that_is_shown(page, server):
    choose_preset(page, "fastercache", "fastercache")
    set_steps(page, 2, 5)
    run_pair(page)
    open_tab(page, "Code")
    page.wait_for_function("document.querySelector('#code').innerText.includes('num_inference_steps=5')")
    href = page.get_attribute("#downloads a[download='report.zip']", "href")
    with zipfile.ZipFile(BytesIO(httpx.get(f"{server.url}{href}", timeout=60).content)) as report:
        assert {"index.html", "a.mp4", "b.mp4", "side_by_side.mp4", "run.json"} <= set(report.namelist())
        assert json.loads(report.read("run.json"))["steps"] == 5
    open_tab(page, "Compare")


def test_settings_in_the_address_are_in_the_widgets(browser, server):
    with visit(browser, server, "?preset=asymrnr&seed=42&steps=20&prompt=a+red+ring+spins") as page:
        page.wait_for_selector("#message >> text=settings are those of the link")
        assert page.input_value("#seed input") == "42" and page.input_value("#prompt textarea") == "a red ring spins"
        assert page.is_checked("#use-asymrnr input") and not page.is_checked("#use-fastercache input")
        assert page.input_value("#steps-b input[type=number]") == "20"


def test_every_tab_opens_without_an_error(browser, server):
    with visit(browser, server, width=390) as page:
        for name in ("Sweep", "History", "Vote", "Results", "Code"):
            tab = page.get_by_role("tab", name=name, exact=True)
            if not tab.is_visible():
                page.locator(".overflow-menu button").first.click()
                tab = page.locator(".overflow-dropdown button", has_text=name)
            tab.click()
            page.wait_for_timeout(300)
            assert page.evaluate("document.documentElement.scrollWidth") <= 390, name
