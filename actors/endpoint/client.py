"""Asks over HTTP: an OpenAI-compatible endpoint, with its failures told apart.

A server that fails (429, 5xx, no answer in time) is asked again within bounds, after the time that it names in Retry-After. What
a model answers, be it a refusal, is a :class:`Reply`; what no server will ever take ends the build with a ConfigError.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import httpx

from actors.endpoint.settings import AskFailedError, EndpointSection, Fault, Reply
from cluster.errors import ConfigError
from cluster.harmless import printable

MAX_BYTES = 4 << 20  # of a response
FIRST_WAIT_S = 0.5
_TRANSIENT = {408, 409, 425, 429, 500, 502, 503, 504, 529}
_REFUSED = "PROHIBITED_CONTENT"
_TOO_LONG = ("context length", "context_length", "maximum context", "too long", "too large", "max_model_len")
_POLICY = ("content_filter", "content_policy", "safety", "prohibited")


class _Oversized(Exception):
    pass


class Endpoint:
    """One model behind ``model.base_url``. ``where``: its key in the recipe, for messages."""

    def __init__(self, where: str, model: EndpointSection, sleep: Callable[[float], object] = time.sleep) -> None:
        self.where, self.model, self._sleep = where, model, sleep
        key = model.key(where)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        limits = httpx.Limits(max_connections=model.concurrency, max_keepalive_connections=model.concurrency)
        self._client = httpx.Client(
            base_url=str(model.base_url), headers=headers, timeout=model.timeout_s, limits=limits
        )

    def close(self) -> None:
        """End the connections."""
        self._client.close()

    # --- asking -----------------------------------------------------------------------------------------------------

    def send(self, body: dict[str, Any]) -> Reply:
        """Return the reply to ``body``, a request of chat completions.

        Raises AskFailedError where the server did not answer within its tries, ConfigError where it never will.
        """
        wait, told, reason = FIRST_WAIT_S, "", ""
        began = time.monotonic()
        for number in range(1, self.model.tries + 1):
            asked = None
            try:
                status, headers, content = self._post(body)
            except httpx.TimeoutException:
                reason, told = "time out", f"no answer within {self.model.timeout_s:g} s"
            except httpx.HTTPError as error:
                reason, told = "unreachable", f"{self.model.base_url}: {type(error).__name__}: {error}"
            except _Oversized:
                raise AskFailedError("oversized", f"the response is larger than {MAX_BYTES >> 20} MiB") from None
            else:
                if status == 200:
                    reply = _reply(content, time.monotonic() - began)
                    if reply is not None:
                        return reply
                    reason, told = "server error", "status 200 with a body that is no chat completion"
                elif status in _TRANSIENT or status >= 500:
                    reason = "rate limit" if status == 429 else "server error"
                    told, asked = f"status {status}: {_told(content)}", _retry_after(headers)
                else:
                    return self._refused(status, content, time.monotonic() - began)
            if asked is not None and asked > self.model.longest_wait_s:
                told += f"; it asks to wait {asked:.0f} s, and longest_wait_s is {self.model.longest_wait_s:g}"
                break
            if number < self.model.tries:
                self._sleep(min(wait if asked is None else asked, self.model.longest_wait_s))
                wait *= 2
        raise AskFailedError(reason, f"{told} (try {number} of {self.model.tries})")

    def _post(self, body: dict[str, Any]) -> tuple[int, httpx.Headers, bytes]:
        ends = time.monotonic() + self.model.timeout_s
        with self._client.stream("POST", "/chat/completions", json=body) as response:
            content = bytearray()
            for chunk in response.iter_bytes():
                content += chunk
                if len(content) > MAX_BYTES:
                    raise _Oversized
                if time.monotonic() > ends:
                    raise httpx.ReadTimeout("the answer trickles in")
            return response.status_code, response.headers, bytes(content)

    def _refused(self, status: int, content: bytes, seconds: float) -> Reply:
        """Return what a status that no repetition changes says of this ask; raises ConfigError where it says it of all asks."""
        told = _told(content)
        lower = told.lower()
        if any(word in lower for word in _POLICY):
            return Reply(told, "refused", seconds=seconds)
        if status == 413 or any(word in lower for word in _TOO_LONG):
            raise AskFailedError("too long", f"status {status}: {told}")
        raise self._error(status, told)

    def _error(self, status: int, told: str) -> ConfigError:
        at = f"{self.where}: {self.model.base_url}"
        if status in (401, 403):
            has = f"the key in {self.model.key_variable}" if self.model.key_variable else "an ask without a key"
            return ConfigError(
                f"{at} refuses {has} (status {status}); set key_variable to the variable that holds a valid one"
            )
        if status == 404:
            return ConfigError(
                f"{at} has no model {self.model.model!r}, or no /chat/completions there (status 404: {told})"
            )
        return ConfigError(f"{at} does not take such an ask (status {status}: {told})")

    # --- before the first ask ---------------------------------------------------------------------------------------

    def check(self) -> None:
        """Raise ConfigError where the endpoint is not there, refuses the key, or does not have the model."""
        at = f"{self.where}.base_url={self.model.base_url}"
        try:
            response = self._client.get("/models", timeout=min(10.0, self.model.timeout_s))
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise ConfigError(
                f"{at}: nothing answers there ({error}); is the server running, and is the address right?"
            ) from error
        if response.status_code in (401, 403):
            raise self._error(response.status_code, "")
        if response.status_code != 200:
            return  # not every server lists its models
        try:
            names = [str(item["id"]) for item in response.json()["data"]]
        except (ValueError, KeyError, TypeError):
            return
        if names and self.model.model not in names:
            known = ", ".join(names[:8]) + (", …" if len(names) > 8 else "")
            raise ConfigError(f"{self.where}.model={self.model.model!r}: {self.model.base_url} has {known}")

    def takes(self, body: dict[str, Any]) -> str:
        """Return why the endpoint does not take ``body``, a small ask; empty where it does. Raises AskFailedError."""
        try:
            self.send(body)
        except ConfigError as error:
            return str(error)
        return ""


def _reply(content: bytes, seconds: float) -> Reply | None:
    """Return the reply in a response's body, None where it is no chat completion."""
    try:
        values = json.loads(content)
        choice = values["choices"][0]
        message, finish = choice["message"], choice.get("finish_reason")
        text, refusal = message.get("content") or "", message.get("refusal") or ""
        usage = values.get("usage") or {}
        tokens_in, tokens_out = int(usage.get("prompt_tokens") or 0), int(usage.get("completion_tokens") or 0)
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
        return None
    if not isinstance(text, str):
        return None
    fault: Fault = ""
    if refusal or finish == "content_filter" or text.strip().upper().startswith(_REFUSED):
        fault, text = "refused", str(refusal or text)
    elif finish == "length":
        fault = "truncated"
    elif not text.strip():
        fault = "empty"
    return Reply(text, fault, tokens_in, tokens_out, round(seconds, 3))


def _told(content: bytes) -> str:
    """Return what an error's body says, as one short line."""
    try:
        values = json.loads(content)
        error = values.get("error", values) if isinstance(values, dict) else values
        text = (
            " ".join(str(error[name]) for name in ("code", "message") if error.get(name))
            if isinstance(error, dict)
            else str(error)
        )
    except (ValueError, RecursionError):
        text = content[:2000].decode("utf-8", "replace")
    return printable(" ".join(text.split()), 300)


def _retry_after(headers: httpx.Headers) -> float | None:
    """Return the seconds that Retry-After asks to wait, None where it says nothing."""
    value = headers.get("retry-after", "").strip()
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        when = parsedate_to_datetime(value)
    except ValueError:
        return None
    return max(0.0, (when.replace(tzinfo=when.tzinfo or UTC) - datetime.now(UTC)).total_seconds())
