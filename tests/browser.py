"""What all tests in a real browser share: where it is, how it starts, their marks, and its console."""

import shutil
import warnings

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ["--no-sandbox", "--autoplay-policy=no-user-gesture-required", "--disable-background-networking"]
if CHROMIUM is None:
    warnings.warn("NO BROWSER: the page is not tested; install chromium (apt-get install chromium)", stacklevel=1)
MARKS = [
    pytest.mark.browser, pytest.mark.skipif(CHROMIUM is None, reason="NO BROWSER: chromium is missing"),
    pytest.mark.xdist_group("browser"),  # one process, so that one browser serves all
]  # fmt: skip


def collect_errors(page) -> list[str]:
    """A list that gets the errors of a page's console, of its scripts, and requests to other hosts."""
    errors = []
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda request: errors.append(request.url) if _is_foreign(request.url) else None)
    return errors


def _is_foreign(url: str) -> bool:
    return url.startswith("http") and not url.startswith(("http://127.0.0.1:", "http://localhost:"))
