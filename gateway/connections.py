"""What a connection may be while no request is on it: not for long, not without end, and not in everybody's way.

uvicorn waits for ever for a request that has begun and does not go on, and at its limit turns away whoever comes next,
a platform's probe too. Here those make room who hold a connection and ask for nothing.
"""

from __future__ import annotations

import asyncio
import json
import resource
from http import HTTPStatus
from typing import cast

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

HEAD_WITHIN_S = 10.0
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


class Connection(H11Protocol):
    """uvicorn's, with a deadline for each request's head (64 KiB at most, by h11) and a place that can be lost."""

    _deadline: asyncio.TimerHandle | None = None
    idle_since = 0.0

    @property
    def is_idle(self) -> bool:
        cycle = cast("RequestResponseCycle | None", self.cycle)  # None before the first request
        return cycle is None or cycle.response_complete

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.idle_since = self.loop.time()
        self._wait_for_head()
        if len(self.connections) > MOST_CONNECTIONS:
            others = (
                one for one in self.connections if isinstance(one, Connection) and one.is_idle
            )
            min(others, key=lambda one: one.idle_since).close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.is_idle:
            self._wait_for_head()
        else:
            self._stop_waiting()

    def on_response_complete(self) -> None:
        self.idle_since = self.loop.time()
        super().on_response_complete()

    def send_400_response(self, msg: str) -> None:
        """For what is no HTTP, or has a head beyond all bounds: like every other answer."""
        if (
            self.conn.our_state is h11.SEND_BODY
        ):  # it was answered already, and has gone wrong since
            self.transport.close()
            return
        body = json.dumps({"detail": msg}).encode()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"connection", b"close"),
            *SECURITY_HEADERS,
        ]
        status = HTTPStatus.BAD_REQUEST
        for event in (
            h11.Response(status_code=status, headers=headers, reason=status.phrase.encode()),
            h11.Data(data=body),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def close(self) -> None:
        # At once out of the count: the transport tells of its end a moment later.
        self.connections.discard(self)
        self.transport.close()

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
            self.close()


def allow_files() -> None:
    """Lift our own limit of open files, often 1,024, as far as the connections need and the system lets us."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_CONNECTIONS + _OTHER_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
