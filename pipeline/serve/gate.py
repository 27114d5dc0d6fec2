"""What every request passes before anything of its body is read: who may ask, from which page, how much, and whether there is room.

A plain ASGI layer. Not responsible for what the request says (``api``).
"""

from __future__ import annotations

import ipaddress
import secrets
from collections.abc import Callable
from http.cookies import CookieError, SimpleCookie
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders, QueryParams
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster.variables import SERVE_TOKEN

COOKIE = "vans_token"
POLICY = (
    "default-src 'self'; img-src 'self' data: blob:; media-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' blob:; "
    "style-src 'self' 'unsafe-inline'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; worker-src 'self' blob:; "
    "frame-ancestors 'none'; base-uri 'self'; form-action 'self'"
)
"""What the page may load: nothing from elsewhere. Gradio's own scripts need the exceptions."""
_FORM = 1 << 20  # bytes of a form besides its file


def is_loopback(host: str) -> bool:
    """Return whether ``host`` names this machine alone."""
    try:
        return host == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


class Gate:
    """Refuses with 401, 403, 413 or 429 and a sentence; lets all else through.

    ``token`` None: anyone on this machine may ask. A page of another site is refused all the same: its requests name that site
    as their origin, or that site's name as their host. ``busy`` returns the seconds to wait where there is no room, else None.
    """

    def __init__(self, app: ASGIApp, *, token: str | None, most_bytes: int, busy: Callable[[], int | None]) -> None:
        self._app, self._token, self._most, self._busy = app, token, most_bytes + _FORM, busy

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request that is refused; hand on another."""
        if scope["type"] != "http":
            await (
                self._app(scope, receive, send) if scope["type"] == "lifespan" else send({"type": "websocket.close"})
            )
            return
        headers = Headers(scope=scope)
        refusal = self._refused(scope, headers)
        if refusal is not None:
            await refusal(scope, receive, send)
            return
        await self._app(scope, self._counted(receive), _with_policy(send))

    def _refused(self, scope: Scope, headers: Headers) -> Response | None:
        origin, host = headers.get("origin"), headers.get("host", "")
        if origin is not None and urlsplit(origin).netloc != host:
            return _said(403, f"a page of {origin} may not ask this server")
        if self._token is None:
            if not is_loopback(urlsplit(f"//{host}").hostname or ""):
                return _said(403, f"this server answers to this machine's own names alone, and was asked as {host!r}")
        elif not self._known(headers):
            given = QueryParams(scope["query_string"]).get("token", "")
            if scope["path"] == "/" and secrets.compare_digest(given.encode(), self._token.encode()):
                return _signed_in(scope, self._token)
            return _said(
                401,
                f"a token is needed: send the header 'Authorization: Bearer …' with the server's {SERVE_TOKEN}, or open "
                "/?token=… once in the browser",
                {"WWW-Authenticate": "Bearer"},
            )
        if scope["method"] == "POST" and scope["path"] == "/v1/answers":
            length = headers.get("content-length", "0")
            if length.isdigit() and int(length) > self._most:
                return _said(413, self._too_large)
            if (seconds := self._busy()) is not None:
                return full(seconds)
        return None

    def _known(self, headers: Headers) -> bool:
        assert self._token is not None
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            try:
                cookie = SimpleCookie(headers.get("cookie", "")).get(COOKIE)
            except CookieError:
                cookie = None
            given = cookie.value if cookie is not None else ""
        return secrets.compare_digest(given.strip().encode(), self._token.encode())

    def _counted(self, receive: Receive) -> Receive:
        taken = 0

        async def counted() -> Message:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > self._most:
                raise HTTPException(413, self._too_large)
            return message

        return counted

    @property
    def _too_large(self) -> str:
        return f"the upload is larger than {(self._most - _FORM) >> 20} MiB (data.max_source_mib)"


def _with_policy(send: Send) -> Send:
    async def sent(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            headers["Content-Security-Policy"] = POLICY
            headers["X-Content-Type-Options"] = "nosniff"
            headers["Referrer-Policy"] = "same-origin"
        await send(message)

    return sent


def full(seconds: int) -> Response:
    """Return the refusal of a request for which there is no room, with the time after which to ask again."""
    return _said(
        429, f"as many videos wait as may (serve.limits.queue); ask again in {seconds} s", {"Retry-After": str(seconds)}
    )


def _signed_in(scope: Scope, token: str) -> Response:
    """Return the page's address without the token, which the browser keeps from here on."""
    response = RedirectResponse("/", 303)
    response.set_cookie(COOKIE, token, httponly=True, samesite="strict", secure=scope.get("scheme") == "https")
    return response


def _said(status: int, detail: str, headers: dict[str, str] | None = None) -> Response:
    return JSONResponse({"detail": detail}, status, headers)
