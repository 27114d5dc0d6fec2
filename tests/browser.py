"""The machine's Chromium for tests that look at a page as a person does, driven by Playwright.

Where either is missing such a test is skipped, with the reason; with ``VANS_REQUIRE_BROWSER=1``, as in CI, it fails.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

REQUIRED = "VANS_REQUIRE_BROWSER"
NAMES = ("chromium", "chromium-browser", "google-chrome")


class Seen:
    """A page with what it asked for and complained of."""

    def __init__(self, page: Any) -> None:
        self.page = page
        self.asked: list[str] = []
        self.complaints: list[str] = []
        page.on("request", lambda request: self.asked.append(request.url))
        page.on("console", lambda message: self.complaints.append(message.text))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))


@contextmanager
def chromium() -> Iterator[Any]:
    """Start Chromium, a browser of Playwright's synchronous API, and close it."""
    path = next((found for name in NAMES if (found := shutil.which(name))), None)
    if path is None:
        _missing("no Chromium on this machine (Debian: apt-get install chromium)")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        _missing("Playwright is not installed")
    with sync_playwright() as driver:
        # As root Chromium has no sandbox; it opens nothing here but our own pages.
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


def _missing(reason: str) -> None:
    if os.environ.get(REQUIRED) == "1":
        pytest.fail(f"{reason}, and {REQUIRED}=1 asks for it", pytrace=False)
    pytest.skip(reason)
