"""What stands before every request: the token and the size of the body.

Plain ASGI: Starlette's middleware on classes hides it when a client leaves.
"""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from starlette.responses import JSONResponse

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

OPEN_PATHS = ("/", "/health", "/ping", "/ready", "/docs", "/openapi.json")
"""Asked for without a token: probes have none, and the pages hold nothing of the model."""
PAGE_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = (
    (b"content-security-policy", PAGE_POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-store"),
)


class TokenGuard:
    """Answers 401 unless the request carries `Authorization: Bearer TOKEN`.

    Args:
        token: None lets everybody in.
    """

    def __init__(self, app: App, token: str | None) -> None:
        self.app = app
        self.expected = None if token is None else f"Bearer {token}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on, or refuse."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *HEADERS]
            await send(message)

        if self.expected is None or scope["path"] in OPEN_PATHS or self._knows(scope):
            await self.app(scope, receive, send_with_headers)
            return
        refusal = _problem(401, "this server wants the header `Authorization: Bearer TOKEN` with DFU_TOKEN's value")
        refusal.headers["www-authenticate"] = "Bearer"
        await refusal(scope, receive, send_with_headers)

    def _knows(self, scope: Scope) -> bool:
        given = dict(scope["headers"]).get(b"authorization", b"")
        return self.expected is not None and hmac.compare_digest(given, self.expected)


class BodyGuard:
    """Reads the body before anything works on it: 413 where it is too long, 408 where it does not come.

    Args:
        max_bytes: longest body.
        timeout_s: time that it may take to arrive.
    """

    def __init__(self, app: App, max_bytes: int, timeout_s: float) -> None:
        self.app = app
        self.max_bytes = max_bytes
        self.timeout_s = timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on with the body in one piece, or refuse."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            async with asyncio.timeout(self.timeout_s):
                body = await self._read(scope, receive)
        except TimeoutError:
            await _problem(408, f"the body did not arrive within {self.timeout_s:g} s")(scope, receive, send)
            return
        if body is None:
            await _problem(413, f"the body is longer than {self.max_bytes} bytes")(scope, receive, send)
            return
        await self.app(scope, _replay(body, receive), send)

    async def _read(self, scope: Scope, receive: Receive) -> bytes | None:
        """The body; None when it is too long."""
        stated = dict(scope["headers"]).get(b"content-length", b"0")
        if stated.isdigit() and int(stated[:20]) > self.max_bytes:
            return None
        body = bytearray()
        more = True
        while more and len(body) <= self.max_bytes:
            message = await receive()
            body += message.get("body", b"")
            more = message.get("more_body", False)
        return bytes(body) if len(body) <= self.max_bytes else None


def _replay(body: bytes, receive: Receive) -> Receive:
    waiting: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def next_message() -> Message:
        return waiting.pop() if waiting else await receive()

    return next_message


def _problem(status: int, sentence: str) -> JSONResponse:
    return JSONResponse({"error": sentence}, status)
