"""Every way in which an endpoint can fail, against a real server on loopback."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import pytest
from aiohttp import web

from actors.endpoint.client import MAX_BYTES, Endpoint
from actors.endpoint.settings import AskFailedError
from cluster.errors import ConfigError
from pipeline.data.build.models import ModelSection
from tests.scripted_server import ScriptedServer, completion

BODY = {"model": "scripted", "messages": [{"role": "user", "content": "hello"}]}


def endpoint(server: ScriptedServer, waits: list[float] | None = None, **settings: Any) -> Endpoint:
    model = ModelSection(model="scripted", base_url=server.base_url, **settings)
    return Endpoint("models.writer", model, sleep=(waits if waits is not None else []).append)


def test_an_answer_has_its_text_and_tokens() -> None:
    with ScriptedServer(lambda *_: "fine") as server:
        reply = endpoint(server).send(BODY)
    assert (reply.text, reply.fault, reply.tokens_in, reply.tokens_out) == ("fine", "", 100, 20)


def test_a_rate_limit_is_waited_out_as_long_as_the_server_says() -> None:
    def script(form: str, body: Any, before: int) -> Any:
        return (
            web.json_response({"error": "slow down"}, status=429, headers={"Retry-After": "7"})
            if before < 2
            else "fine"
        )

    waits: list[float] = []
    with ScriptedServer(script) as server:
        assert endpoint(server, waits).send(BODY).text == "fine"
    assert waits == [7.0, 7.0]


def test_retry_after_may_be_a_date() -> None:
    until = format_datetime(datetime.now(UTC) + timedelta(seconds=30))

    def script(form: str, body: Any, before: int) -> Any:
        return web.json_response({}, status=503, headers={"Retry-After": until}) if not before else "fine"

    waits: list[float] = []
    with ScriptedServer(script) as server:
        endpoint(server, waits).send(BODY)
    assert 20 < waits[0] <= 30


def test_a_wait_that_is_too_long_ends_the_ask_at_once() -> None:
    waits: list[float] = []
    with ScriptedServer(lambda *_: web.json_response({}, status=429, headers={"Retry-After": "3600"})) as server:
        with pytest.raises(AskFailedError, match="asks to wait 3600 s, and longest_wait_s is 60") as caught:
            endpoint(server, waits).send(BODY)
        assert sum(server.seen.values()) == 1
    assert caught.value.reason == "rate limit"
    assert not waits


def test_a_server_that_stays_broken_is_asked_as_often_as_set_with_longer_waits() -> None:
    waits: list[float] = []
    with ScriptedServer(lambda *_: web.Response(status=500, text="Internal <b>error</b>")) as server:
        with pytest.raises(AskFailedError, match=r"status 500: Internal .* \(try 4 of 4\)") as caught:
            endpoint(server, waits, tries=4).send(BODY)
        assert sum(server.seen.values()) == 4
    assert caught.value.reason == "server error"
    assert waits == [0.5, 1.0, 2.0]


@pytest.mark.parametrize("trickle", [False, True])
def test_a_slow_server_times_out(trickle: bool) -> None:
    async def slow(request: Any) -> Any:
        await asyncio.sleep(3)
        return "late"

    def script(form: str, body: Any, before: int) -> Any:
        return slow(body)

    if trickle:

        class Trickling(web.StreamResponse):
            async def prepare(self, request: Any) -> Any:
                writer = await super().prepare(request)
                for _ in range(20):
                    await self.write(b" ")
                    await asyncio.sleep(0.1)
                return writer

        def script(form: str, body: Any, before: int) -> Any:
            return Trickling()

    with ScriptedServer(script) as server, pytest.raises(AskFailedError) as caught:
        endpoint(server, timeout_s=0.4, tries=2).send(BODY)
    assert caught.value.reason == "time out"


def test_nobody_there_is_told_before_the_first_video_and_counted_later() -> None:
    with ScriptedServer() as server:
        gone = endpoint(server, tries=2)
    with pytest.raises(ConfigError, match=r"models.writer.base_url=http://127.0.0.1:\d+/v1: nothing answers there"):
        gone.check()
    with pytest.raises(AskFailedError) as caught:
        gone.send(BODY)
    assert caught.value.reason == "unreachable"


@pytest.mark.parametrize(
    ("response", "fault"),
    [
        (completion("half an ans", "length"), "truncated"),
        (completion("", "stop"), "empty"),
        (completion(None, "content_filter"), "refused"),
        (completion(None, refusal="I can't help with that"), "refused"),
        (completion("PROHIBITED_CONTENT"), "refused"),
    ],
)
def test_what_is_no_whole_answer_says_why(response: Any, fault: str) -> None:
    with ScriptedServer(lambda *_: response) as server:
        assert endpoint(server).send(BODY).fault == fault


def test_a_policy_that_refuses_by_its_status_is_a_refusal() -> None:
    body = {"error": {"code": "content_policy_violation", "message": "no"}}
    with ScriptedServer(lambda *_: web.json_response(body, status=400)) as server:
        assert endpoint(server).send(BODY).fault == "refused"


def test_an_oversized_answer_is_not_read_to_its_end() -> None:
    with ScriptedServer(lambda *_: "x" * (2 * MAX_BYTES)) as server, pytest.raises(AskFailedError) as caught:
        endpoint(server).send(BODY)
    assert caught.value.reason == "oversized"


def test_a_prompt_that_is_too_long_costs_itself_alone() -> None:
    body = {"error": {"message": "This model's maximum context length is 4096 tokens"}}
    with (
        ScriptedServer(lambda *_: web.json_response(body, status=400)) as server,
        pytest.raises(AskFailedError) as caught,
    ):
        endpoint(server).send(BODY)
    assert caught.value.reason == "too long"


def test_a_body_that_is_no_completion_is_a_server_error() -> None:
    with ScriptedServer(lambda *_: web.Response(text="<html>")) as server, pytest.raises(AskFailedError) as caught:
        endpoint(server, tries=1).send(BODY)
    assert caught.value.reason == "server error"


def test_the_key_goes_out_and_stands_in_no_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WRITER_KEY", "s3cret-key")
    with ScriptedServer(key="s3cret-key") as server:
        endpoint(server, key_variable="WRITER_KEY").check()
        monkeypatch.setenv("WRITER_KEY", "another-key")
        with pytest.raises(ConfigError, match="refuses the key in WRITER_KEY") as caught:
            endpoint(server, key_variable="WRITER_KEY").check()
        assert "another-key" not in str(caught.value)
        monkeypatch.delenv("WRITER_KEY")
        with pytest.raises(ConfigError, match="the environment has no WRITER_KEY: `export WRITER_KEY="):
            endpoint(server, key_variable="WRITER_KEY")


def test_a_model_that_the_endpoint_does_not_have_is_named_with_those_it_has() -> None:
    with ScriptedServer(models=("qwen", "glm")) as server, pytest.raises(ConfigError, match="has qwen, glm"):
        endpoint(server).check()
