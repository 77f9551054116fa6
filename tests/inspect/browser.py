"""A real Chromium for tests of pages: pages opened from disk, everything that it reports kept."""

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium on the PATH: apt install chromium")


@contextmanager
def chromium() -> Iterator[Browser]:
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def opened(
    browser: Browser, html: str, folder: Path, *, width: int = 1200, height: int = 850, dark: bool = False
) -> Iterator[Page]:
    """The page at a file:// address. Fails where the page logs a warning or error, throws, asks, or loads anything."""
    path = folder / "page.html"
    path.write_text(html, encoding="utf-8")
    scheme = "dark" if dark else "light"
    page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
    said: list[str] = []
    own = f"request: {path.as_uri()}"
    page.on("console", lambda message: said.append(f"console: {message.text}"))
    page.on("pageerror", lambda error: said.append(f"error: {error}"))
    page.on("dialog", lambda dialog: (said.append(f"dialog: {dialog.message}"), dialog.dismiss()))
    page.on("request", lambda request: said.append(f"request: {request.url}"))
    try:
        page.goto(path.as_uri())
        yield page
        page.wait_for_timeout(30)
        if complaints := [line for line in said if not line.startswith(("request: data:", own))]:
            pytest.fail("\n".join(complaints))
    finally:
        page.close()


def until(page: Page, expression: str, argument: object = None, *, seconds: float = 10) -> None:
    """Waits for a script to give true. The page's own policy forbids playwright's way to wait, which evaluates text."""
    end = time.monotonic() + seconds
    while not page.evaluate(expression, argument):
        assert time.monotonic() < end, f"never came true: {expression}"
        page.wait_for_timeout(30)
