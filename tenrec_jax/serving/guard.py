"""What every request passes before the routes see it: its id, the token, the size and pace of its body, and security headers on its answer.

Plain ASGI, outside the framework: so it holds for every answer, also for paths that are not there and for defects.
"""

import asyncio
import hmac
import json
import re
import time
import uuid
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tenrec_jax.serving.metrics import Metrics

REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}", re.ASCII)
NO_CONTENT = "default-src 'none'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
SECURITY_HEADERS = {
    "cache-control": "no-store",
    "content-security-policy": NO_CONTENT,
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
}


@dataclass(frozen=True)
class Limits:
    """What a client may ask of the server.

    Attributes:
        max_body_bytes: of one request. body_seconds: from its head to the end of its body.
        token: that clients must show; None asks for none.
    """

    max_body_bytes: int = 2**20
    body_seconds: float = 10.0
    token: str | None = None


class ApiError(Exception):
    """An answer that tells what is wrong.

    Attributes:
        status: of HTTP. field: what is wrong in the request, None where that is no single thing. headers: of the answer.
    """

    def __init__(
        self, status: int, message: str, field: str | None = None, headers: dict[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.field, self.headers = status, message, field, headers

    def response(self, request_id: str) -> Response:
        """As JSON."""
        error = {"field": self.field, "message": self.message, "request_id": request_id}
        return Response(json.dumps({"error": error}), self.status, self.headers, "application/json")


class Guard:
    """Wraps the application.

    Args:
        endpoints: the paths that are counted by name; others count as "other".
        public: those of them that need no token.
    """

    def __init__(
        self, app: ASGIApp, limits: Limits, metrics: Metrics, *, endpoints: Collection[str], public: Collection[str]
    ) -> None:
        self._app, self._limits, self._metrics = app, limits, metrics
        self._endpoints, self._public = frozenset(endpoints), frozenset(public)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, given = time.perf_counter(), Headers(scope=scope).get("x-request-id", "")
        request_id = given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        endpoint = scope["path"] if scope["path"] in self._endpoints else "other"

        async def send_on(message: Message) -> None:
            if message["type"] == "http.response.start":
                seconds = time.perf_counter() - began
                _complete(MutableHeaders(scope=message), request_id, seconds)
                self._metrics.requests.labels(endpoint, message["status"]).inc()
                self._metrics.seconds.labels(endpoint).observe(seconds)
            await send(message)

        try:
            self._check_token(scope)
            body = await self._body(scope, receive)
        except ApiError as error:
            await error.response(request_id)(scope, receive, send_on)
            return
        await self._app(scope, _replayed(body, receive), send_on)

    def _check_token(self, scope: Scope) -> None:
        token = self._limits.token
        if token is None or scope["path"] in self._public:
            return
        expected, given = f"Bearer {token}", Headers(scope=scope).get("authorization", "")
        if not hmac.compare_digest(given.encode(), expected.encode()):
            raise ApiError(
                401, "Send the server's token: Authorization: Bearer TOKEN.", None, {"www-authenticate": "Bearer"}
            )

    async def _body(self, scope: Scope, receive: Receive) -> bytes:
        """The whole body, so that no handler waits for a client."""
        limit, length = self._limits.max_body_bytes, Headers(scope=scope).get("content-length", "0")
        # A client that is still sending hears an answer only when it is done: so some more is read, and thrown away.
        patience = 8 * limit
        if int(length) > patience:
            raise _too_large(limit)
        body, size, more = bytearray(), 0, True
        try:
            async with asyncio.timeout(self._limits.body_seconds):
                while more and size <= patience:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ApiError(400, "The body ended before its length.")
                    part, more = message.get("body", b""), message.get("more_body", False)
                    size += len(part)
                    if size <= limit:
                        body += part
        except TimeoutError:
            late = f"The body did not arrive within {self._limits.body_seconds:g} seconds."
            raise ApiError(408, late, None, {"connection": "close"}) from None
        if size > limit:
            raise _too_large(limit)
        return bytes(body)


def _too_large(limit: int) -> ApiError:
    message = f"The body is larger than {limit:,} bytes. Send less in one request."
    return ApiError(413, message, None, {"connection": "close"})


def _complete(headers: MutableHeaders, request_id: str, seconds: float) -> None:
    for name, value in SECURITY_HEADERS.items():
        headers.setdefault(name, value)
    headers["x-request-id"] = request_id
    headers.append("server-timing", f"server;dur={1e3 * seconds:.2f}")


def _replayed(body: bytes, receive: Receive) -> Receive:
    """The body as one message, then what else comes."""
    messages: list[Any] = [{"type": "http.request", "body": body, "more_body": False}]

    async def next_message() -> Message:
        return messages.pop() if messages else await receive()

    return next_message
