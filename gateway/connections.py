"""What a connection may be while nothing moves on it: not for long, not without end, and not in everybody's way.

uvicorn waits for ever for a request that has begun and does not go on, and for a reader who does not read; and at its
limit it turns away whoever comes next, a platform's probe too. Here those make room who hold a connection and ask for
nothing.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import resource
import sys
import termios
import time
from http import HTTPStatus
from typing import TYPE_CHECKING, cast

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

if TYPE_CHECKING:
    from uvicorn._types import ASGI3Application

HEAD_WITHIN_S = 10.0
# TCP sends what was lost again after 0.2 s, 0.4 s and so on: seven times by then, so that it is no gap of a network.
STALLED_S = 30.0
MOST_HEAD_BYTES = 64 * 1024
MOST_CONNECTIONS = 2000
# Beside the callers': Cog's, the bucket's and the webhooks' connections, logs, pipes.
_OTHER_FILES = 500

SECURITY_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-frame-options", b"DENY"),
    (b"cross-origin-opener-policy", b"same-origin"),
    # The page has its own; nothing else here is meant to be looked at as one.
    (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'"),
)


class Connection(HttpToolsProtocol):
    """uvicorn's, with limits for each request's head, which its parser has none of, and a place that can be lost.

    A reader of whose answer nothing leaves here for `STALLED_S` is cut off. However slow, one who reads is not.
    """

    idle_since = 0.0
    _deadline: asyncio.TimerHandle | None = None
    _next_look: asyncio.TimerHandle | None = None
    _unread_before = 0
    _answering: RequestResponseCycle | None = None
    """The request whose turn it is. `cycle` is the last that came, which may wait for it."""
    _overhead = 0
    """How many bytes have come since the last that brought a request on: a head, or what goes around a body's parts."""

    @property
    def is_idle(self) -> bool:
        cycle = cast("RequestResponseCycle | None", self.cycle)  # None before the first request
        return cycle is None or cycle.response_complete

    @property
    def can_go(self) -> bool:
        """Whether all that may be lost with it is what its reader has left unread."""
        return self.is_idle or self.transport.is_closing()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.idle_since = time.monotonic()  # finer than uvloop's
        self._wait_for_head()
        if len(self.connections) > MOST_CONNECTIONS:
            others = (one for one in self.connections if isinstance(one, Connection) and one.can_go)
            min(others, key=lambda one: one.idle_since).make_room()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        if self._next_look is not None:
            self._next_look.cancel()
        if self._answering is not None and not self._answering.response_complete:
            # uvicorn tells the last that came alone, and this one would write on.
            self._answering.disconnected = True
            self._answering.message_event.set()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._overhead += len(data)
        super().data_received(data)
        if self._overhead > MOST_HEAD_BYTES and not self.transport.is_closing():
            self._refuse(
                HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE,
                f"the URL and the headers of a request have at most {MOST_HEAD_BYTES} bytes",
            )
        elif self.is_idle:
            self._wait_for_head()
        else:
            self._stop_waiting()

    def on_headers_complete(self) -> None:
        self._overhead = 0
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._overhead = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._overhead = 0
        super().on_message_complete()

    def on_response_complete(self) -> None:
        self.idle_since = time.monotonic()
        super().on_response_complete()
        self._watch_reader()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_reader()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        self._answering = cycle
        super()._start_asgi_task(cycle, app)

    def send_400_response(self, msg: str) -> None:
        self._refuse(HTTPStatus.BAD_REQUEST, msg)

    def _refuse(self, status: HTTPStatus, detail: str) -> None:
        """Like every other answer, and the last; none where one has begun, as this would be taken for a part of it."""
        if self.is_idle or not self.cycle.response_started:
            body = json.dumps({"detail": detail}).encode()
            headers = (
                (b"content-type", b"application/json"),
                (b"content-length", b"%d" % len(body)),
                (b"connection", b"close"),
                *SECURITY_HEADERS,
            )
            first = b"HTTP/1.1 %d %b" % (status, status.phrase.encode())
            lines = (first, *(b"%b: %b" % header for header in headers), b"", body)
            self.transport.write(b"\r\n".join(lines))
        self._close()

    def make_room(self) -> None:
        # At once out of the count: the transport tells of its end a moment later. Not by `close`, which waits until
        # all is read, and so may keep the file open for ever.
        self.connections.discard(self)
        self.transport.abort()

    def _close(self) -> None:
        self.transport.close()
        self._watch_reader()

    def _watch_reader(self) -> None:
        """From now on, as no more is written until something is read, or until there is another answer."""
        if self._next_look is not None:
            self._next_look.cancel()
            self._next_look = None
        self._unread_before = _unread(self.transport)
        if self._unread_before:
            self._next_look = self.loop.call_later(STALLED_S, self._look_at_reader)

    def _look_at_reader(self) -> None:
        # Of an answer that is being written, as much may have come as went.
        is_still = self.flow.write_paused or self.can_go
        if is_still and _unread(self.transport) == self._unread_before:
            self.transport.abort()
        else:
            self._watch_reader()

    def _wait_for_head(self) -> None:
        if self._deadline is None:
            self._deadline = self.loop.call_later(HEAD_WITHIN_S, self._too_late)

    def _stop_waiting(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _too_late(self) -> None:
        self._deadline = None
        if self.is_idle:
            self._close()


def _unread(transport: asyncio.Transport) -> int:
    """How many bytes the other side has not taken, where some of them are still here and not all the system's."""
    here = transport.get_write_buffer_size()
    if not here:
        return 0
    connection = transport.get_extra_info("socket")
    try:
        # Linux takes more from us once a third of its megabytes has left, which may be long for a slow reader.
        told = fcntl.ioctl(connection.fileno(), termios.TIOCOUTQ, bytes(4))
    except OSError:
        return here
    return here + int.from_bytes(told, sys.byteorder)


def allow_files() -> None:
    """Lift our own limit of open files, often 1,024, as far as the connections need and the system lets us."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_CONNECTIONS + _OTHER_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
