"""A scripted OpenAI-compatible server on loopback: it answers by the form that is asked for, and misbehaves as a test says."""

from __future__ import annotations

import asyncio
import hashlib
import json
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

from aiohttp import web

DESCRIPTION = {
    "full_screen": True,
    "clean": True,
    "action": "slice the bread",
    "start": 0.0,
    "end": 1.0,
    "description": "Hands move over a wooden board in a bright room.",
}
WORDING = {
    "question": "I have finished this part, so how do I go on from here?",
    "reasoning": "This part is finished, and a usual course of such a task goes on with whatever is ready to be used.",
    "caption": "A large rabbit walks out of its burrow and stretches under a tree.",
}
WHAT_IFS = {
    "visual_tie": "place",
    "visual_why": "the same meadow",
    "logical_tie": "order",
    "logical_why": "one goes on with what the other began",
    "questions": [WORDING, {**WORDING, "question": "What if nobody disturbs what began here, how will it go on?"}],
}
VERDICT = {
    "gives_away": False,
    "several_answers": False,
    "mentions_target": False,
    "caption_mismatch": False,
    "why": "",
}
ANSWERS: dict[str, Any] = {
    "description": DESCRIPTION,
    "wording": WORDING,
    "whatifs": WHAT_IFS,
    "verdict": VERDICT,
    "colour": {"colour": "red"},
}

Script = Callable[[str, dict[str, Any], int], Any]
"""(form's name, the request, how often that very request came before) → None for the usual answer, text of an answer, or a response."""


def completion(text: str | None, finish: str = "stop", **message: Any) -> dict[str, Any]:
    """Return a chat completion whose message is ``text``."""
    return {
        "id": "x",
        "object": "chat.completion",
        "choices": [
            {"index": 0, "finish_reason": finish, "message": {"role": "assistant", "content": text, **message}}
        ],
        "usage": {"prompt_tokens": 100, "completion_tokens": 20, "total_tokens": 120},
    }


def text_of(body: dict[str, Any]) -> str:
    """Return the text of a request's last message."""
    content = body["messages"][-1]["content"]
    return (
        content if isinstance(content, str) else "\n".join(part["text"] for part in content if part["type"] == "text")
    )


def images_of(body: dict[str, Any]) -> int:
    """Return how many pictures and videos a request shows."""
    return sum(part["type"] != "text" for part in body["messages"][-1]["content"])


class ScriptedServer:
    """The server, on a thread of its own. ``seen`` counts requests by their bytes, ``forms`` by the form asked for."""

    def __init__(
        self,
        script: Script | None = None,
        *,
        key: str = "",
        models: tuple[str, ...] = ("scripted",),
        delay_s: float = 0.0,
    ):
        self.script, self.key, self.models, self.delay_s = script, key, models, delay_s
        self.seen: Counter[str] = Counter()
        self.forms: Counter[str] = Counter()
        self.most = 0
        self._now = 0
        self._loop = asyncio.new_event_loop()
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self.port = 0

    @property
    def base_url(self) -> str:
        """What a recipe calls it by."""
        return f"http://127.0.0.1:{self.port}/v1"

    def __enter__(self) -> ScriptedServer:
        self._thread.start()
        assert self._started.wait(30)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        app = web.Application(client_max_size=64 << 20)
        app.router.add_get("/v1/models", self._list)
        app.router.add_post("/v1/chat/completions", self._answer)
        runner = web.AppRunner(app)
        self._loop.run_until_complete(runner.setup())
        site = web.TCPSite(runner, "127.0.0.1", 0)
        self._loop.run_until_complete(site.start())
        self.port = site._server.sockets[0].getsockname()[1]  # type: ignore[union-attr]
        self._started.set()
        self._loop.run_forever()
        self._loop.run_until_complete(runner.cleanup())

    def _refused(self, request: web.Request) -> web.Response | None:
        if self.key and request.headers.get("Authorization") != f"Bearer {self.key}":
            return web.json_response({"error": {"message": "bad key"}}, status=401)
        return None

    async def _list(self, request: web.Request) -> web.Response:
        return self._refused(request) or web.json_response({"data": [{"id": name} for name in self.models]})

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        if refused := self._refused(request):
            return refused
        raw = await request.read()
        body = json.loads(raw)
        digest = hashlib.sha256(raw).hexdigest()
        before = self.seen[digest]
        self.seen[digest] += 1
        form = body.get("response_format", {}).get("json_schema", {}).get("name", "")
        self.forms[form] += 1
        self._now += 1
        self.most = max(self.most, self._now)
        try:
            if self.delay_s:
                await asyncio.sleep(self.delay_s)
            said = self.script(form, body, before) if self.script else None
            if asyncio.iscoroutine(said):
                said = await said
            if isinstance(said, web.StreamResponse):
                return said
            if isinstance(said, dict):
                return web.json_response(said)
            return web.json_response(
                completion(json.dumps(ANSWERS.get(form, {}), ensure_ascii=False) if said is None else said)
            )
        finally:
            self._now -= 1
