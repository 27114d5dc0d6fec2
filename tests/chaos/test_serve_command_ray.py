"""``vans serve`` as a process of its own, as people start it: its answers beside those of ``vans answer``, and a page whose server
is stopped and started again."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.pipeline.serve.serving import QUESTION, answered, ask, free_port, put, serving_process, toy_clip

pytest.importorskip("grpc_reflection", reason="the extra `serve` is not installed")
pytestmark = [pytest.mark.chaos, pytest.mark.ray]
ENDLESS = 100_000
"""Denoising steps of a clip that no test could wait for."""
LOST = "Connection to the server was lost"


class Server:
    """``vans serve`` of the tiny pair, at the same port whenever it is started."""

    def __init__(self) -> None:
        self._words = (f"serve.port={free_port()}", f"serve.limits.steps={ENDLESS}")
        self._running = ExitStack()

    def start(self) -> str:
        """Start it and return its address."""
        return self._running.enter_context(serving_process(*self._words))

    def stop(self) -> None:
        """Stop it as Ctrl-C does."""
        self._running.close()


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.stop()


@pytest.fixture(scope="module")
def address(server: Server) -> str:
    return server.start()


def test_the_server_answers_as_vans_answer_does(address: str, tmp_path: Path) -> None:
    """Each loads the pair for itself: the same file, question and seed have the same caption, and the same bytes of mp4."""
    clip, out = tmp_path / "filmed.mp4", tmp_path / "answer.mp4"
    clip.write_bytes(toy_clip(3))
    with httpx.Client(base_url=address, timeout=60) as client:
        (question,) = answered(client, ask(client, toy_clip(3), seed=11).json()["id"])["questions"]
        assert question["state"] == "done", question
        served = client.get(question["video"]).content
    words = ["answer", "--video", str(clip), "--question", QUESTION, "--seed", "11", "--out", str(out)]
    done = subprocess.run([sys.executable, "-m", "pipeline", *words], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert question["caption"] in " ".join(done.stdout.split())
    assert out.read_bytes() == served


def test_a_page_says_that_its_server_has_gone_and_asks_the_next_one(server: Server, address: str, browser: Any) -> None:
    page = browser.new_page()
    page.goto(address)
    page.click("#settings button")
    page.fill("#steps input[type=number]", str(ENDLESS))
    page.press("#steps input[type=number]", "Tab")
    put(page, toy_clip(), QUESTION)
    page.wait_for_function("() => document.querySelector('#progress progress')?.value > 0.5", timeout=60_000)
    server.stop()
    page.get_by_text(LOST).first.wait_for()
    server.start()
    page.reload()
    put(page, toy_clip(), QUESTION)
    page.wait_for_selector(".vans-pair video", timeout=60_000)
    assert page.get_by_text(LOST).count() == 0
    page.close()
