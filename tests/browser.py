"""A headless Chromium for tests of pages; a test that needs it is skipped by the name of what is missing."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")


def require_browser() -> str:
    """Return the path of Chromium; skip the test where it or Playwright is missing."""
    if importlib.util.find_spec("playwright") is None:
        pytest.skip("Playwright is missing: pip install playwright")
    path = next((found for name in NAMES if (found := shutil.which(name)) is not None), None)
    if path is None:
        pytest.skip("Chromium is missing: apt-get install chromium")
    return path


class OpenPage:
    """A page in the browser, with what it said and asked for."""

    def __init__(self, page: Any) -> None:
        self.page = page
        self.said: list[str] = []
        self.asked: list[str] = []
        page.on("console", lambda message: self.said.append(message.text))
        page.on("pageerror", lambda error: self.said.append(str(error)))
        page.on("dialog", lambda dialog: self.said.append(f"dialog {dialog.message}"))
        page.on("request", lambda request: self.asked.append(request.url))

    def open(self, path: Path) -> None:
        """Open a file and wait until its script is done."""
        self.page.goto(path.as_uri())
        self.page.wait_for_selector("html[data-ready]", state="attached", timeout=60_000)


@contextmanager
def open_page(path: Path, width: int = 1280, scheme: str = "light") -> Iterator[OpenPage]:
    """Open a file in Chromium."""
    executable = require_browser()
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
        opened = OpenPage(page)
        opened.open(path)
        yield opened
        browser.close()
