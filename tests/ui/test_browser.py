"""The page in a real browser: what plays at first, a live pair, the kept baseline, Stop, bad input, a phone."""

import os
import shutil
import warnings
from pathlib import Path

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
if CHROMIUM is None:
    warnings.warn("NO BROWSER: the page is not tested; install chromium (apt-get install chromium)", stacklevel=1)
pytestmark = [pytest.mark.browser, pytest.mark.skipif(CHROMIUM is None, reason="NO BROWSER: chromium is missing")]
SHOTS = os.environ.get("ACCEL_SCREENSHOTS")


@pytest.fixture(scope="module")
def url():
    import app

    demo = app.launch(prevent_thread_lock=True, quiet=True)
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


@pytest.fixture
def page(browser, url):
    context = browser.new_context(viewport={"width": 1280, "height": 1000}, reduced_motion="no-preference")
    page = context.new_page()
    page.goto(url)
    page.wait_for_selector("#player video", state="attached", timeout=30_000)
    yield page
    context.close()


def shot(page, name: str) -> None:
    if SHOTS:
        page.screenshot(path=Path(SHOTS) / f"{name}.png", full_page=True)


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


def choose_preset(page, name: str) -> None:
    page.locator("#preset input").click()
    page.get_by_role("option", name=name, exact=True).click()


def test_a_recorded_pair_plays_before_anything_is_computed(page):
    assert "Recorded pair" in page.inner_text("#message")
    page.wait_for_function("document.querySelector('#player video').currentTime > 0.2", timeout=10_000)
    page.wait_for_timeout(1500)
    a, b = page.evaluate("[...document.querySelectorAll('#player video')].map((v) => v.currentTime)")
    assert abs(a - b) < 1.5 / 8
    assert page.locator("#timeline rect").count() > 100
    shot(page, "first-visit")


def test_a_live_pair_shows_both_videos_figures_and_timeline(page):
    page.fill("#prompt textarea", "a large green cross orbits slowly over a dotted brown background")
    run_pair(page, 14)
    text = page.inner_text("#numbers")
    assert "speed of denoising" in text and "of the work computed" in text and "PSNR" in text
    assert page.locator("#timeline rect[fill='#f59e0b']").count() > 0
    shot(page, "live-pair")
    run_pair(page, 14)
    assert "kept, measured" in page.inner_text("#player .a figcaption")


def test_frames_can_be_stepped_and_views_changed(page):
    page.click("#player [data-do=play]")
    page.evaluate(
        "document.querySelector('#player .seek').value = 0; document.querySelector('#player .seek').oninput()"
    )
    page.wait_for_timeout(300)
    page.click("#player [data-do=next]")
    page.wait_for_function("document.querySelector('#player .count').textContent.startsWith('2 /')")
    page.click("#player [data-mode=difference] >> nth=-1")
    assert page.is_visible("#player canvas")
    page.click("#player button[data-mode=wipe]")
    assert page.is_visible("#player .wipe")
    shot(page, "wipe")


def test_the_views_controls_stay_in_force_with_a_new_pair(page):
    page.click("#player button[data-mode=wipe]")
    page.evaluate(
        """() => { const wipe = document.querySelector('#player .wipe'); wipe.value = 20; wipe.oninput(); }"""
    )
    page.select_option("#player .rate", "0.5")
    run_pair(page, 11)
    page.wait_for_function("document.querySelector('#player video').playbackRate === 0.5", timeout=5_000)
    assert page.evaluate("document.querySelector('#player .ab').style.getPropertyValue('--wipe')") == "20%"
    shot(page, "wipe-new-pair")


def test_stop_ends_the_run_within_a_step(page):
    set_steps(page, 100)
    page.click("#run")
    page.wait_for_selector("#live-a .live >> text=step", timeout=60_000)
    page.click("#stop")
    page.wait_for_selector("#message >> text=Stopped", timeout=5_000)
    assert page.locator("#live-a .live").count() == 0
    assert "(recorded)" in page.inner_text("#player") and "recorded, measured" in page.inner_text("#numbers")


def test_bad_input_is_told_and_nothing_is_lost(page):
    page.fill("#prompt textarea", "   ")
    page.click("#run")
    page.wait_for_selector("#message >> text=the prompt is empty", timeout=30_000)
    assert page.locator("#player video").count() == 2
    page.fill("#prompt textarea", "a red dragon spins")
    page.fill("#seed input", "1.5")
    page.click("#run")
    page.wait_for_selector("#message >> text=seed = 1.5 is not a whole number", timeout=30_000)


def test_unknown_words_are_named(page):
    page.fill("#prompt textarea", "a red dragon spins")
    run_pair(page, 10)
    assert "does not know: dragon" in page.inner_text("#message")


def test_the_page_fits_a_phone(browser, url):
    context = browser.new_context(viewport={"width": 390, "height": 800})
    page = context.new_page()
    page.goto(url)
    page.wait_for_selector("#player video", state="attached", timeout=30_000)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    shot(page, "phone")
    context.close()


def test_token_reduction_shows_its_rates_and_the_tokens_that_stay(page):
    choose_preset(page, "asymrnr")
    page.wait_for_function("document.querySelector('#use-asymrnr input').checked")
    run_pair(page, 12)
    page.wait_for_selector("#maps svg[aria-label='tokens that stay']", state="attached")
    assert page.locator("#maps rect").count() > 2 * 8 * 12
    assert "of this model's work" in page.inner_text("#maps")
    shot(page, "maps")


def test_a_student_runs_in_its_own_steps_beside_the_plain_model_in_as_many(page):
    choose_preset(page, "gpd")
    page.wait_for_function("document.querySelector('#use-gpd input').checked")
    page.check("#also input")
    assert not page.is_visible("#rival video >> nth=0")
    run_pair(page, 12)
    assert "gpd, 6 steps" in page.inner_text("#player .b figcaption")
    assert "accel.METHODS['gpd']()" in page.inner_text("#code") and "num_inference_steps=6" in page.inner_text("#code")
    page.wait_for_selector("#rival video >> nth=1", timeout=60_000)
    assert "plain, 6 steps" in page.inner_text("#rival .a figcaption")
    assert "gpd, 6 steps" in page.inner_text("#rival .b figcaption")
    shot(page, "student")
    page.uncheck("#also input")
    page.fill("#seed input", "2")
    run_pair(page, 12)
    page.wait_for_selector("#rival video >> nth=0", state="hidden", timeout=60_000)


def test_predicted_passes_are_on_the_timeline_and_what_they_cost_in_the_note(page):
    choose_preset(page, "disca")
    page.wait_for_function("document.querySelector('#use-disca input').checked")
    assert page.is_checked("#use-meanflow input")
    run_pair(page, 12)
    assert "meanflow, disca, 20 steps" in page.inner_text("#player .b figcaption")
    assert "8 of 20 passes are whole" in page.inner_text("#message")
    assert page.locator("#timeline rect[fill='#a855f7']").count() == 8 * 12  # blocks, predicted steps
    shot(page, "disca")


def test_a_predictor_without_its_student_is_refused_in_a_sentence(page):
    choose_preset(page, "disca")
    page.wait_for_function("document.querySelector('#use-disca input').checked")
    page.uncheck("#use-meanflow input")
    page.click("#run")
    page.wait_for_selector("#message >> text=put the meanflow that it was trained for before it", timeout=60_000)
    assert "belongs to another model than the one that runs" in page.inner_text("#message")
