"""The playground in a browser, as people use it: on Ray Serve with the tiny pair. All tests share one server.

Every page is looked at when its test ends: it has asked nothing but this server, and complained of nothing.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from pipeline.config import RunConfig, load_config
from pipeline.data.video import decode_video
from tests.browser import Seen
from tests.pipeline.serve.serving import QUESTION, export_adapter, free_port, put, toy_clip

pytestmark = pytest.mark.chaos
pytest.importorskip("grpc_reflection", reason="the extra `serve` is not installed")

ENDLESS = 100_000
"""Denoising steps of a clip that no test could wait for."""
WHAT_IF = "what if it were reversed ?"
ANSWER_MS = 60_000
PLAYER = {"Method not implemented."}
"""What Gradio's own player says in the console."""


@pytest.fixture(scope="module")
def config() -> RunConfig:
    return load_config("toy", [f"serve.port={free_port()}", f"serve.limits.steps={ENDLESS}", "data.max_source_mib=4"])


@pytest.fixture(scope="module")
def address(
    browser: Any, ray_local: None, config: RunConfig, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """A server of a pair whose artist was trained, and of the pair before; none is started where there is no browser."""
    from ray import serve

    from pipeline.serve.app import served
    from pipeline.serve.exports import with_models

    adapter = tmp_path_factory.mktemp("trained") / "vdm_adapter"
    export_adapter(adapter, "vdm", 0.5)
    with served(with_models(config, None, str(adapter)), None, before=config) as address:
        yield address
    serve.shutdown()


@pytest.fixture
def visit(browser: Any, address: str) -> Iterator[Callable[..., Any]]:
    """Open the playground for one more person, in a context of its own."""
    pages: list[Seen] = []

    def opened(**options: Any) -> Any:
        page = browser.new_page(**options)
        pages.append(Seen(page))
        page.goto(address)
        page.wait_for_selector("#ask")
        return page

    yield opened
    for seen in pages:
        seen.page.close()
        assert not [url for url in seen.asked if not url.startswith((address, "data:", "blob:"))]
        assert set(seen.complaints) <= PLAYER


def answers(page: Any, count: int, state: str = "done") -> list[str]:
    """Return what the newest answers on the page say, when ``count`` questions are in ``state``."""
    page.wait_for_function(
        f"() => document.querySelectorAll('#answers .vans-{state}').length == {count}", timeout=ANSWER_MS
    )
    return [article.inner_text() for article in page.query_selector_all("#answers article")]


PLAYING = """() => {
    const clips = [...document.querySelectorAll(".vans-pair video")];
    return clips.length == 4 && clips.every((clip) => clip.currentTime > 0);
}"""
COLUMNS = """() => [...document.querySelectorAll(".vans-compare .vans-answer")].map((answer) => {
    const place = answer.getBoundingClientRect();
    return {left: place.left, right: place.right, top: place.top};
})"""


def test_a_person_sees_two_what_ifs_play_beside_their_clip(visit: Callable[..., Any]) -> None:
    page = visit()
    put(page, toy_clip(), QUESTION, "<b>what if</b> it were reversed ?")
    page.wait_for_function(PLAYING, timeout=ANSWER_MS)
    shown = page.inner_text("#answers")
    assert "<b>what if</b> it were reversed ?" in shown and "contact sheet" in shown
    assert page.query_selector(".vans-progress") is None  # it is gone with the last clip


def test_the_pair_before_training_answers_in_a_column_beside_the_tuned_one(visit: Callable[..., Any]) -> None:
    page = visit()
    page.check("#compare input")
    put(page, toy_clip(), QUESTION)
    page.wait_for_function(PLAYING, timeout=ANSWER_MS)
    tuned, before = page.evaluate(COLUMNS)
    assert tuned["right"] <= before["left"] and tuned["top"] == before["top"]
    facts = [text.inner_text() for text in page.query_selector_all(".vans-compare .vans-facts")]
    assert [text.split(" · ")[0] for text in facts] == ["this pair", "before training"]
    inputs, clips = (
        [page.locator(".vans-pair video").nth(n).get_attribute("src") for n in pair] for pair in ((0, 2), (1, 3))
    )
    shown = [httpx.get(page.url.rstrip("/") + str(address)).content for address in (*inputs, *clips)]
    assert shown[0] == shown[1] and shown[2] != shown[3]


def test_earlier_answers_of_a_session_stay_below_the_newest(visit: Callable[..., Any]) -> None:
    page = visit()
    put(page, toy_clip(), QUESTION)
    answers(page, 1)
    page.fill("#questions textarea", WHAT_IF)
    page.click("#ask")
    newest, older = answers(page, 2)
    assert newest.startswith(WHAT_IF) and older.startswith(QUESTION)


def test_two_people_who_ask_at_once_each_get_their_own_answer(visit: Callable[..., Any]) -> None:
    one, other = visit(), visit()
    put(one, toy_clip(0), QUESTION)
    put(other, toy_clip(1), WHAT_IF)
    assert [text.splitlines()[0] for page in (one, other) for text in answers(page, 1)] == [QUESTION, WHAT_IF]
    inputs = [page.get_attribute(".vans-pair video", "src") for page in (one, other)]
    assert inputs[0] != inputs[1]


def test_what_is_asked_can_be_cancelled_while_it_is_drawn(visit: Callable[..., Any]) -> None:
    page = visit()
    page.click("#settings button")
    page.fill("#steps input[type=number]", str(ENDLESS))
    page.press("#steps input[type=number]", "Tab")
    put(page, toy_clip(), QUESTION)
    page.wait_for_function("() => document.querySelector('#progress progress')?.value > 0.5", timeout=ANSWER_MS)
    page.click("#cancel")
    assert answers(page, 1, "cancelled")[0].startswith(QUESTION)
    page.fill("#steps input[type=number]", "4")
    page.press("#steps input[type=number]", "Tab")
    page.click("#ask")  # there is one artist: it is free again
    assert len(answers(page, 1)) == 2  # the cancelled one stays below


def downloaded(page: Any, link: Any) -> tuple[str, bytes]:
    with page.expect_download() as found:
        link.click()
    return found.value.suggested_filename, Path(found.value.path()).read_bytes()


def test_an_answer_is_downloaded_as_clip_sheet_and_json(
    visit: Callable[..., Any], config: RunConfig, tmp_path: Path
) -> None:
    page = visit()
    put(page, toy_clip(), QUESTION)
    answers(page, 1)
    files = dict(downloaded(page, link) for link in page.query_selector_all(".vans-link"))
    assert {Path(name).suffix for name in files} == {".mp4", ".png", ".json"}
    (tmp_path / "out.mp4").write_bytes(files["answer-1.mp4"])
    shape = config.video.num_frames, config.video.height, config.video.width
    assert decode_video(tmp_path / "out.mp4", *shape).shape == (*shape, 3)
    assert Image.open(io.BytesIO(files["contact-sheet.png"])).format == "PNG"
    (told,) = (json.loads(data) for name, data in files.items() if name.endswith(".json"))
    assert told["state"] == "done" and told["questions"][0]["question"] == QUESTION


@pytest.mark.parametrize(
    ("clip", "questions", "told"),
    [
        (b"this is text", [QUESTION], "broken video"),
        (toy_clip(), [], "it is empty"),
        (None, [QUESTION], "There is no clip yet: drop one, record one, or choose an example."),
    ],
)
def test_what_cannot_be_answered_is_said_on_the_page(
    visit: Callable[..., Any], clip: bytes | None, questions: list[str], told: str
) -> None:
    page = visit()
    put(page, clip, *questions)
    said = page.wait_for_selector("#answers .vans-error").inner_text()
    assert told in said and "/tmp" not in said


def test_a_file_that_is_too_large_is_refused_on_the_page(visit: Callable[..., Any]) -> None:
    page = visit()
    file = {"name": "in.mp4", "mimeType": "video/mp4", "buffer": bytes(6 << 20)}
    page.set_input_files("#video input[type=file]", file)
    page.get_by_text("exceed the maximum allowed size of 4.0 Mb").first.wait_for()
    page.fill("#questions textarea", QUESTION)
    page.click("#ask")
    assert "There is no clip yet" in page.wait_for_selector("#answers .vans-error").inner_text()  # it was not taken


def test_the_page_fits_a_phone_and_speaks_chinese(visit: Callable[..., Any], address: str) -> None:
    page = visit(locale="zh-CN", viewport={"width": 390, "height": 844})
    assert "提问" in page.inner_text("#ask") and "接下来会发生什么" in page.inner_text("body")
    page.click("#ask")
    page.wait_for_selector(".vans-error")
    put(page, toy_clip(), QUESTION)
    page.wait_for_selector(".vans-pair video", timeout=ANSWER_MS)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert httpx.get(address).headers["content-security-policy"].startswith("default-src 'self'")
