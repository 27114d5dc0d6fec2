"""Who may ask a server that wants a token, without models behind it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from pipeline.config import load_config
from pipeline.serve.api import build
from pipeline.serve.desk import Desk, Pair
from pipeline.serve.gate import is_loopback
from tests.pipeline.serve.serving import toy_clip

TOKEN = "a long random text"


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., httpx.Response]:
    """Ask a server whose replicas are never reached: one that wants the token, or one that wants none."""
    desk = {
        name: Desk(load_config("toy"), {"served": Pair(_never, _never)}, tmp_path_factory.mktemp("gate"))
        for name in "ab"
    }
    apps = {TOKEN: build(desk["a"], TOKEN), None: build(desk["b"], None)}

    def ask(
        method: str, path: str, token: str | None = TOKEN, host: str = "10.0.0.1", **request: Any
    ) -> httpx.Response:
        async def send() -> httpx.Response:
            transport = httpx.ASGITransport(apps[token])
            async with httpx.AsyncClient(transport=transport, base_url=f"http://{host}:8000") as client:
                return await client.request(method, path, **request)

        return asyncio.run(send())

    return ask


def _never(request: object) -> Any:
    raise AssertionError("a request that was refused came through")


@pytest.mark.parametrize(
    "headers",
    [{}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Basic {TOKEN}"}, {"Cookie": "vans_token=wrong"}],
)
def test_without_the_token_nothing_is_read(asked: Callable[..., httpx.Response], headers: dict[str, str]) -> None:
    for method, path in (
        ("GET", "/openapi.json"),
        ("POST", "/v1/answers"),
        ("GET", "/v1/answers/x"),
        ("DELETE", "/v1/answers/x"),
    ):
        response = asked(method, path, headers=headers, files={"video": toy_clip()} if method == "POST" else None)
        assert response.status_code == 401 and "VANS_SERVE_TOKEN" in response.json()["detail"]
        assert response.headers["www-authenticate"] == "Bearer"
        assert TOKEN not in response.text


def test_with_the_token_it_answers(asked: Callable[..., httpx.Response]) -> None:
    assert asked("GET", "/openapi.json", headers={"Authorization": f"Bearer {TOKEN}"}).status_code == 200


def test_a_browser_gives_the_token_once_and_its_address_keeps_none(asked: Callable[..., httpx.Response]) -> None:
    response = asked("GET", "/", params={"token": TOKEN})
    assert response.status_code == 303 and response.headers["location"] == "/"
    cookie = response.headers["set-cookie"]
    assert "HttpOnly" in cookie and "samesite=strict" in cookie.lower()
    value = cookie.partition(";")[0]
    assert asked("GET", "/openapi.json", headers={"Cookie": value}).status_code == 200
    assert asked("GET", "/", params={"token": "wrong"}).status_code == 401


def test_another_sites_page_may_not_ask_even_with_the_cookie(asked: Callable[..., httpx.Response]) -> None:
    headers = {"Authorization": f"Bearer {TOKEN}", "Origin": "http://elsewhere.example"}
    assert asked("GET", "/openapi.json", headers=headers).status_code == 403


def test_without_a_token_only_names_of_this_machine_are_answered(asked: Callable[..., httpx.Response]) -> None:
    assert asked("GET", "/openapi.json", None, "127.0.0.1").status_code == 200
    assert asked("GET", "/openapi.json", None, "rebound.example").status_code == 403


@pytest.mark.parametrize(
    ("host", "local"),
    [(name, True) for name in ("127.0.0.1", "::1", "localhost")]
    + [(name, False) for name in ("0.0.0.0", "example.org")],
)
def test_loopback_is_known(host: str, local: bool) -> None:
    assert is_loopback(host) is local
