"""Bodies that are too large or too slow are refused as soon as that is known, without holding what is left of them.

Plain ASGI in front of any application: it counts what the application receives, and touches no answer but its own.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable, MutableMapping
from http import HTTPStatus
from typing import Any

from gateway.refusals import REASON

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]

MEBIBYTE = 1024 * 1024
# A socket that is closed with bytes unread is reset, and the reset may overtake our answer: so the rest is read and
# thrown away for a moment. A client that knows HTTP stops sending once it sees the answer.
LINGER_SECONDS = 2.0

log = logging.getLogger(__name__)


class BodyLimits:
    """ASGI middleware: 413 for a body of more than `most_bytes`, 408 for one that is waited for longer than `seconds`.

    A declared length is judged before the application sees the request. A body without one is passed on as it comes
    and counted; where it goes too far, the caller gets the 413, the application an `http.disconnect`, and whatever
    that makes it answer or raise is dropped. The seconds are those that the application waits for parts of the body:
    its own work between them is not the caller's fault. Once it has begun to answer, it needs no body: the deadline
    is gone, and a body that grows too large looks like a caller who left.
    """

    def __init__(
        self, app: Application, *, most_bytes: int = MEBIBYTE, seconds: float = 30.0
    ) -> None:
        self._app = app
        self._most_bytes = most_bytes
        self._seconds = seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        exchange = _Exchange(receive, send, self._most_bytes, self._seconds)
        if declared_length(scope) > self._most_bytes:
            await exchange.refuse_as_too_large()
        else:
            await exchange.run(self._app, scope)
        await exchange.close_if_refused()
        if exchange.is_refused:
            scope[REASON] = "input"


def declared_length(scope: Scope) -> int:
    """What Content-Length says; 0 where it says nothing that can be read."""
    for name, value in scope["headers"]:
        # int() alone would also take "+1" and "1_0".
        if name.lower() == b"content-length" and value.isdigit():
            return int(value)
    return 0


class _Exchange:
    """One request and its answer."""

    def __init__(self, receive: Receive, send: Send, most_bytes: int, seconds: float) -> None:
        self._receive = receive
        self._send = send
        self._most_bytes = most_bytes
        self._seconds = seconds
        self._seconds_left = seconds
        self._received = 0
        self._is_received = False
        self._answer_has_begun = False
        self.is_refused = False

    async def run(self, app: Application, scope: Scope) -> None:
        try:
            await app(scope, self._receive_for_app, self._send_for_app)
        except Exception:
            if not self.is_refused:
                raise
            log.debug(
                "the application ended with an error after its caller was refused", exc_info=True
            )

    async def refuse_as_too_large(self) -> None:
        await self._refuse(
            HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
            f"The body is larger than {self._most_bytes} bytes, the most that is taken here.",
        )

    async def close_if_refused(self) -> None:
        """Throw away what still comes for a moment, then let the server close the connection."""
        if not self.is_refused:
            return
        try:
            async with asyncio.timeout(LINGER_SECONDS):
                while not self._is_received:
                    await self._receive_and_count()
        except TimeoutError:
            pass
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _receive_for_app(self) -> Message:
        if self.is_refused:
            return {"type": "http.disconnect"}
        if self._is_received:
            return await self._receive()
        message = await self._next_part()
        if message is None:
            await self._refuse(
                HTTPStatus.REQUEST_TIMEOUT,
                f"The body did not arrive within {self._seconds:g} seconds.",
            )
            return {"type": "http.disconnect"}
        if self._received <= self._most_bytes:
            return message
        if not self._answer_has_begun:
            await self.refuse_as_too_large()
        return {"type": "http.disconnect"}

    async def _next_part(self) -> Message | None:
        """The next part of the body, or None where the caller has been waited for long enough."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        try:
            while True:
                try:
                    async with asyncio.timeout(self._seconds_left_to_wait()):
                        return await self._receive_and_count()
                except TimeoutError:
                    # The answer may have begun meanwhile, in another task of the application.
                    if not self._answer_has_begun:
                        return None
        finally:
            self._seconds_left -= loop.time() - began

    def _seconds_left_to_wait(self) -> float | None:
        return None if self._answer_has_begun else self._seconds_left

    async def _receive_and_count(self) -> Message:
        message = await self._receive()
        self._received += len(message.get("body", b""))
        # A disconnect has no more_body either: nothing will come after it.
        self._is_received = not message.get("more_body", False)
        return message

    async def _send_for_app(self, message: Message) -> None:
        if self.is_refused:
            return
        self._answer_has_begun = True
        await self._send(message)

    async def _refuse(self, status: HTTPStatus, detail: str) -> None:
        self.is_refused = True
        body = json.dumps({"detail": detail}).encode()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"connection", b"close"),
        ]
        await self._send(
            {"type": "http.response.start", "status": status.value, "headers": headers}
        )
        # The caller has all of it; that more might come keeps the server from closing the connection already.
        await self._send({"type": "http.response.body", "body": body, "more_body": True})
