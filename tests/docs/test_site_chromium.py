"""The site as a person reads it, in Chromium: built strictly, served on loopback, nothing from outside, no complaint."""

from __future__ import annotations

import functools
import http.server
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.browser import Seen
from tests.docs.pages import ROOT

pytestmark = pytest.mark.slow
WIDTHS = (1280, 390)
SEEN = (
    "index.html",
    "start.html",
    "algorithm.html",
    "pitfalls.html",
    "configuration.html",
    "api.html",
    "commands.html",
)


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Without a line for each request."""

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(out)]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return out


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    handler = functools.partial(Quiet, directory=str(site))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_nothing_on_any_page_is_loaded_from_elsewhere(site: Path) -> None:
    loads = re.compile(
        r"""<(?:script|img|video|source|iframe|link(?! rel="?canonical))[^>]*?(?:src|href)=["']?(?:https?:)?//"""
    )
    pages = list(site.rglob("*.html"))
    assert len(pages) > 25
    assert not [page.name for page in pages if loads.search(page.read_text(encoding="utf-8"))]
    assert not [css for css in site.rglob("*.css") if re.search(r"url\(['\"]?(?:https?:)?//", css.read_text())]


@pytest.mark.parametrize("width", WIDTHS)
def test_pages_are_shown_without_a_complaint_or_a_request_to_elsewhere(address: str, browser: Any, width: int) -> None:
    page = browser.new_page(viewport={"width": width, "height": 800})
    seen = Seen(page)
    for name in SEEN:
        page.goto(f"{address}/{name}")
        assert page.locator("h1").count() == 1, name
        wide = page.evaluate("document.documentElement.scrollWidth - innerWidth")
        assert wide <= 0, f"{name} is {wide} pixels wider than the window"
    assert len(seen.asked) > len(SEEN)
    assert not [url for url in seen.asked if not url.startswith((address, "data:", "blob:"))]
    assert not seen.complaints
    page.close()


def test_the_first_pages_clip_plays_formulas_are_drawn_and_the_search_finds(address: str, browser: Any) -> None:
    page = browser.new_page(viewport={"width": 1280, "height": 800})
    page.goto(f"{address}/index.html")
    page.wait_for_function("document.querySelector('video').currentTime > 0.2")
    page.goto(f"{address}/algorithm.html")
    assert page.locator("math").count() > 20
    assert page.locator("div.formula math").nth(1).bounding_box()["height"] > 25  # a fraction
    assert "\\frac" not in page.inner_text("article")
    page.locator("input[name=query]").click()
    page.locator("input[name=query]").press_sequentially("ratio gate")
    page.wait_for_selector(".md-search-result__link")
    assert "gate" in page.inner_text(".md-search-result__list").lower()
    page.close()
