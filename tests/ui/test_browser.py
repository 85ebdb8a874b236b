"""The page in a real browser: first visit, a live pair, the cached baseline, Stop, bad input, a phone."""

import shutil
import warnings
from contextlib import contextmanager

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
if CHROMIUM is None:
    warnings.warn("NO BROWSER: the page is not tested; install chromium (apt-get install chromium)", stacklevel=1)
pytestmark = [
    pytest.mark.browser, pytest.mark.skipif(CHROMIUM is None, reason="NO BROWSER: chromium is missing"),
    pytest.mark.xdist_group("browser"),  # one process, so that one server and one browser serve all
]  # fmt: skip
BLOCKS = 8  # of the shipped model


@pytest.fixture(scope="module")
def url():
    import app

    demo = app.launch(quiet=True)
    yield demo.local_url
    demo.close()


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    flags = ["--no-sandbox", "--autoplay-policy=no-user-gesture-required", "--disable-background-networking"]
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield browser
        browser.close()


@contextmanager
def visit(browser, url, width: int = 1280, motion: str = "reduce"):
    """A new visitor's page; with reduced motion no video plays by itself."""
    context = browser.new_context(viewport={"width": width, "height": 1000}, reduced_motion=motion)
    page = context.new_page()
    page.goto(url)
    page.wait_for_selector("#player video", state="attached", timeout=30_000)
    yield page
    context.close()


@pytest.fixture(scope="module")
def page(browser, url):
    """One visitor's page for all tests that set everything they need of it."""
    with visit(browser, url) as page:
        yield page


def set_steps(page, steps: int) -> None:
    box = page.locator("#steps input[type=number]")
    box.fill(str(steps))
    box.press("Tab")


def run_pair(page, steps: int) -> None:
    set_steps(page, steps)
    page.click("#run")
    page.wait_for_selector("#live-a .live", timeout=60_000)
    page.wait_for_selector("#live-a .live", state="detached", timeout=120_000)
    page.wait_for_function(f"document.querySelector('#player .a figcaption').textContent.includes('{steps} steps')")


def choose_preset(page, name: str, active: str) -> None:
    """Choose a preset and wait until the switch of a method that it uses is on."""
    page.locator("#preset input").click()
    page.get_by_role("option", name=name, exact=True).click()
    page.wait_for_function(f"document.querySelector('#use-{active} input').checked")


def test_a_recorded_pair_plays_before_anything_is_computed(browser, url):
    with visit(browser, url, motion="no-preference") as page:
        assert "Recorded pair" in page.inner_text("#message")
        page.wait_for_function("document.querySelector('#player video').currentTime > 0.2", timeout=10_000)
        page.wait_for_timeout(1500)
        a, b = page.evaluate("[...document.querySelectorAll('#player video')].map((v) => v.currentTime)")
        assert abs(a - b) < 1.5 / 8
        assert page.locator("#timeline rect").count() > 100
        assert "recorded, measured" in page.inner_text("#metric-cards")


def test_the_page_fits_a_phone(browser, url):
    with visit(browser, url, width=390) as page:
        assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_a_live_pair_shows_videos_metrics_and_timeline_and_its_baseline_is_cached(page):
    choose_preset(page, "fastercache", "fastercache")
    page.fill("#prompt textarea", "a large green cross orbits slowly over a dotted brown background")
    run_pair(page, 10)
    text = page.inner_text("#metric-cards")
    assert "speed of denoising" in text and "of the work computed" in text and "PSNR" in text
    assert page.locator("#timeline rect[data-action=reuse]").count() > 0
    run_pair(page, 10)
    assert "cached, measured" in page.inner_text("#player .a figcaption")


def test_frames_can_be_stepped_and_views_changed(page):
    page.evaluate(
        "document.querySelector('#player .seek').value = 0; document.querySelector('#player .seek').oninput()"
    )
    page.wait_for_timeout(300)
    page.click("#player [data-do=next]")
    page.wait_for_function("document.querySelector('#player .count').textContent.startsWith('2 /')")
    page.click("#player button[data-mode=difference]")
    assert page.is_visible("#player canvas")
    page.click("#player button[data-mode=wipe]")
    assert page.is_visible("#player .wipe")


def test_the_players_controls_keep_their_settings_with_a_new_pair(page):
    page.click("#player button[data-mode=wipe]")
    page.evaluate("() => { const wipe = document.querySelector('#player .wipe'); wipe.value = 20; wipe.oninput(); }")
    page.select_option("#player .rate", "0.5")
    run_pair(page, 2)
    page.wait_for_function("document.querySelector('#player video').playbackRate === 0.5", timeout=5_000)
    assert page.evaluate("document.querySelector('#player .ab').style.getPropertyValue('--wipe')") == "20%"
    assert page.is_visible("#player .wipe")


def test_stop_ends_the_run_within_a_step_and_keeps_the_last_pair(page):
    shown = page.inner_text("#player figcaption >> nth=1"), page.inner_text("#metric-cards")
    set_steps(page, 100)
    page.click("#run")
    page.wait_for_selector("#live-a .live >> text=step", timeout=60_000)
    page.click("#stop")
    page.wait_for_selector("#message >> text=Stopped", timeout=5_000)
    assert page.locator("#live-a .live").count() == 0
    assert (page.inner_text("#player figcaption >> nth=1"), page.inner_text("#metric-cards")) == shown


def test_refused_input_is_explained_and_nothing_is_lost(page):
    page.fill("#prompt textarea", "   ")
    page.click("#run")
    page.wait_for_selector("#message >> text=the prompt is empty", timeout=30_000)
    assert page.locator("#player video").count() == 2
    page.fill("#prompt textarea", "a red dragon spins")
    page.fill("#seed input", "1.5")
    page.click("#run")
    page.wait_for_selector("#message >> text=seed = 1.5 is not a whole number", timeout=30_000)
    page.fill("#seed input", "1")


def test_words_that_the_model_does_not_know_are_named(page):
    page.fill("#prompt textarea", "a red dragon spins")
    run_pair(page, 2)
    assert "does not know: dragon" in page.inner_text("#message")


def test_token_reduction_shows_its_rates_and_the_tokens_that_stay(page):
    choose_preset(page, "asymrnr", "asymrnr")
    run_pair(page, 8)
    page.wait_for_selector("#token-maps svg[aria-label='tokens that stay']", state="attached")
    assert page.locator("#token-maps rect").count() > 2 * BLOCKS * 8
    assert "of this model's work" in page.inner_text("#token-maps")


def test_a_student_runs_in_its_own_step_count_next_to_a_baseline_with_as_many_steps(page):
    choose_preset(page, "gpd", "gpd")
    page.check("#same-steps-baseline input")
    assert not page.is_visible("#same-steps-player video >> nth=0")
    run_pair(page, 7)
    assert "gpd, 6 steps" in page.inner_text("#player .b figcaption")
    assert "accel.METHODS['gpd']()" in page.inner_text("#code") and "num_inference_steps=6" in page.inner_text("#code")
    page.wait_for_selector("#same-steps-player video >> nth=1", timeout=60_000)
    assert "baseline, 6 steps" in page.inner_text("#same-steps-player .a figcaption")
    assert "gpd, 6 steps" in page.inner_text("#same-steps-player .b figcaption")
    page.uncheck("#same-steps-baseline input")
    page.fill("#seed input", "2")
    run_pair(page, 7)
    page.wait_for_selector("#same-steps-player video >> nth=0", state="hidden", timeout=60_000)


def test_predicted_steps_are_on_the_timeline_and_their_cost_is_in_the_message(page):
    choose_preset(page, "disca", "disca")
    assert page.is_checked("#use-meanflow input")
    run_pair(page, 2)
    assert "meanflow, disca, 20 steps" in page.inner_text("#player .b figcaption")
    assert "8 of 20 forward passes are full" in page.inner_text("#message")
    assert page.locator("#timeline rect[data-action=predict]").count() == BLOCKS * 12  # predicted steps


def test_a_predictor_without_its_student_is_refused_in_a_sentence(page):
    choose_preset(page, "disca", "disca")
    page.uncheck("#use-meanflow input")
    set_steps(page, 2)
    page.click("#run")
    page.wait_for_selector("#message >> text=put the meanflow that it was trained for before disca", timeout=60_000)
    assert "belongs to another model than the one that runs" in page.inner_text("#message")
