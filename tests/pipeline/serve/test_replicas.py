"""The artist's replica in this process, with the tiny artist: what it sends while it draws, and how it stops."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from actors.failures import Failure, Ok
from actors.records import RenderRequest, Sample
from pipeline.config import load_config
from pipeline.fleet.kinds import KINDS
from pipeline.stages.question import caption_request, read_video
from tests.pipeline.serve.serving import toy_clip

pytest.importorskip("grpc_reflection", reason="the extra `serve` is not installed")
MANY = 100_000
"""Steps of a drawing that no test could wait for."""


@pytest.fixture(scope="module")
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    loop = asyncio.new_event_loop()
    yield loop
    loop.close()


@pytest.fixture(scope="module")
def artist(loop: asyncio.AbstractEventLoop) -> Any:
    from pipeline.serve.app import serving
    from pipeline.serve.replicas import Artist

    artist = Artist.__new__(Artist)  # its __init__ is a coroutine, as Ray Serve may have it
    loop.run_until_complete(artist.__init__(dict(KINDS["vdm"].arguments(serving(load_config("toy"))))))  # type: ignore[misc]
    return artist


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Sample:
    clip = tmp_path_factory.mktemp("clip") / "in.mp4"
    clip.write_bytes(toy_clip())
    return read_video(load_config("toy"), clip)


def request(sample: Sample, steps: int, caption: str = "the red circle sinks") -> RenderRequest:
    config = load_config("toy")
    render = config.evaluate.render.model_copy(update={"steps": steps})
    return caption_request(config, sample, caption, 0, render, 1)


async def drawn(artist: Any, wanted: RenderRequest) -> list[Any]:
    return [item async for item in artist.draw(wanted)]


def test_it_says_how_far_it_is_and_draws_what_the_worker_draws(
    loop: asyncio.AbstractEventLoop, artist: Any, sample: Sample
) -> None:
    *shares, outcome = loop.run_until_complete(drawn(artist, request(sample, 4)))
    assert shares == [0.25, 0.5, 0.75, 1.0]
    (plain,) = artist._worker.process([request(sample, 4)])
    assert isinstance(outcome, Ok) and outcome.value.frames.tobytes() == plain.value.frames.tobytes()


def test_a_request_that_cannot_be_drawn_comes_back_as_its_failure(
    loop: asyncio.AbstractEventLoop, artist: Any, sample: Sample
) -> None:
    (outcome,) = loop.run_until_complete(drawn(artist, request(sample, 4, caption=" ")))
    assert isinstance(outcome, Failure) and outcome.kind == "data"


def test_one_that_is_taken_back_stops_within_a_step_and_one_that_waits_never_begins(
    loop: asyncio.AbstractEventLoop, artist: Any, sample: Sample
) -> None:
    calls: list[int] = []
    handle = artist._worker.policy.module.register_forward_hook(lambda *_: calls.append(1))

    async def taken_back() -> int:
        first, waiting = artist.draw(request(sample, MANY)), asyncio.create_task(drawn(artist, request(sample, MANY)))
        assert await anext(first) == 1 / MANY
        await asyncio.sleep(0)  # the other one is in the queue
        waiting.cancel()
        before = len(calls)
        await first.aclose()
        *_, outcome = await drawn(artist, request(sample, 2))
        assert isinstance(outcome, Ok)
        return len(calls) - before - 2

    try:
        assert loop.run_until_complete(taken_back()) <= 2  # the step that it was at, and one that had begun meanwhile
    finally:
        handle.remove()
