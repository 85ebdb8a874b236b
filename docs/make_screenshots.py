"""Makes the pictures of the page in docs/images, in a real browser: python -m docs.make_screenshots

Needs Chromium and playwright. The pictures show the recorded pair, so no video is generated.
"""

import shutil
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

import app

FOLDER = Path(__file__).parent / "images"
PICTURES = {"page": (1280, 900), "phone": (390, 844)}  # name: width and height in pixels
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
         "--disable-sync"]  # fmt: skip
FRAME = 8  # of the recorded videos


def show_recorded_pair(page: Page, url: str) -> None:
    """Open the page and wait until both videos of the recorded pair show `FRAME`."""
    page.goto(url)
    page.wait_for_function("[...document.querySelectorAll('#player video')].filter(v => v.readyState > 1).length >= 2")
    page.wait_for_selector("#timeline rect", state="attached")
    page.evaluate(f"() => {{ const s = document.querySelector('#player .seek'); s.value = {FRAME}; s.oninput(); }}")
    page.wait_for_function("[...document.querySelectorAll('#player video')].slice(0, 2).every(v => !v.seeking)")
    page.wait_for_function("document.fonts.status === 'loaded'")
    page.wait_for_timeout(500)  # until the frames are painted


def main() -> None:
    """Write one PNG for each size in `PICTURES`."""
    FOLDER.mkdir(exist_ok=True)
    demo = app.launch(quiet=True)
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS)
        for name, (width, height) in PICTURES.items():
            page = browser.new_page(viewport={"width": width, "height": height}, reduced_motion="reduce")
            show_recorded_pair(page, demo.local_url)
            page.screenshot(path=FOLDER / f"{name}.png")
            page.close()
        browser.close()
    demo.close()


if __name__ == "__main__":
    main()
