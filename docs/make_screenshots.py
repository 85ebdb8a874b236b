"""Makes the pictures of the page in docs/images, in a real browser: python -m docs.make_screenshots

Needs Chromium and playwright. The browser is started as in the tests of the page. The pictures show recorded pairs, but
for those of the sweep, which is run.
"""

import sys
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

import app
from docs.names import check_names
from ui.server import Options, launch

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from browser import CHROMIUM, FLAGS

FOLDER = Path(__file__).parent / "images"
FRAME = 8  # of the recorded videos
ESTIMATED = "document.querySelector('#estimate').innerText.includes(' · B: ')"  # once the model is loaded
SETTLED = "[...document.querySelectorAll('#player video')].slice(0, 2).every(v => v.readyState > 1 && !v.seeking)"


def first_screen(page: Page) -> None:
    """Both videos of the recorded pair at the same frame."""
    page.click("#player button[data-mode=side]")
    page.locator("#player .seek").fill(str(FRAME))


def race(page: Page) -> None:
    """The recorded race, half-way."""
    page.click("#player .start")
    page.wait_for_function("[...document.querySelectorAll('#player .clock')].some(c => parseFloat(c.innerText) > 2)")


def sweep(page: Page) -> None:
    """A sweep over two knobs with plain steps beside it."""
    page.locator("#preset label:has(input[value=fastercache])").click()
    page.get_by_role("tab", name="Sweep").click()
    page.fill("#sweep-values-first :is(input, textarea)", "2..4")
    page.fill("#sweep-plain-steps :is(input, textarea)", "15,20,25,30,40")
    page.click("#sweep-start")
    page.wait_for_function("document.querySelectorAll('#sweep-grid video').length >= 8", timeout=600_000)


def results(page: Page) -> None:
    """The Results tab with all presets."""
    page.get_by_role("tab", name="Results").click()
    page.wait_for_selector("#results-table tbody tr")


PICTURES = {  # name: what it shows, width and height in pixels, theme
    "page": (first_screen, 1280, 900, "light"), "dark": (first_screen, 1280, 900, "dark"),
    "phone": (first_screen, 390, 844, "light"), "race": (race, 1280, 900, "light"),
    "results": (results, 1280, 900, "light"), "sweep": (sweep, 1280, 900, "light"),
}  # fmt: skip


def main() -> None:
    """Write the pictures named on the command line, or all."""
    names = sys.argv[1:] or list(PICTURES)
    check_names(names, PICTURES)
    FOLDER.mkdir(exist_ok=True)
    server = launch(app.Page, Options(), quiet=True)
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=[*FLAGS, "--disable-gpu"])
        for name in names:
            show, width, height, theme = PICTURES[name]
            page = browser.new_page(viewport={"width": width, "height": height}, reduced_motion="reduce")
            page.goto(f"{server.url}?__theme={theme}")
            page.wait_for_function(SETTLED)
            page.wait_for_selector("#estimate", state="attached")
            page.wait_for_function(ESTIMATED, timeout=120_000)
            show(page)
            page.wait_for_function(f"document.fonts.status === 'loaded' && {SETTLED}")
            page.wait_for_timeout(800)  # until the frames are painted
            page.screenshot(path=FOLDER / f"{name}.png")
            page.close()
        browser.close()
    server.close()


if __name__ == "__main__":
    main()
