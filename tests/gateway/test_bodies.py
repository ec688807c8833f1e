"""What a body may be, seen by real clients of a real server; what comes late or never is said over raw sockets."""

from __future__ import annotations

import contextlib
import http.client
import json
import logging
import queue
import socket
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse
from pydantic import BaseModel

from gateway.bodies import BodyLimits
from tests.support.asgi import HOST, serving

MOST_BYTES = 100_000
# For tests in which a body is meant to be too slow, and for those in which none may be.
SOON, LATE = 0.3, 60.0
PATIENCE = 30.0


class Prompt(BaseModel):
    prompt: str


class Heard:
    """An application that keeps what reaches it, for a test to look at."""

    def __init__(self) -> None:
        self.disconnects: queue.Queue[str] = queue.Queue()
        self.bytes_read: queue.Queue[int] = queue.Queue()
        self.app = FastAPI()
        self.app.post("/length")(self.length)
        self.app.post("/prompt")(self.prompt)
        self.app.post("/unread")(self.unread)
        self.app.post("/early")(self.early)
        self.app.get("/events")(self.events)
        self.app.mount("/plain", self.plain)
        self.app.mount("/stubborn", self.stubborn)

    async def length(self, request: Request) -> int:
        return len(await request.body())

    async def prompt(self, prompt: Prompt) -> str:
        return prompt.prompt

    async def unread(self) -> str:
        return "answered"

    async def early(self, request: Request) -> StreamingResponse:
        """Answers while the body still comes, as the echo of it."""

        async def parts() -> AsyncIterator[bytes]:
            yield b"begun "
            async for part in request.stream():
                yield part

        return StreamingResponse(parts())

    async def events(self, request: Request) -> StreamingResponse:
        """Sends one event, and the next when there is somebody to receive it, until there is nobody."""

        async def parts() -> AsyncIterator[bytes]:
            try:
                number = 0
                while True:
                    yield b"data: %d\n\n" % number
                    number += 1
                    if await request.is_disconnected():
                        return
            finally:
                self.disconnects.put("events")

        return StreamingResponse(parts(), media_type="text/event-stream")

    async def plain(self, scope: Any, receive: Any, send: Any) -> None:
        """Plain ASGI that reads all of the body, and trips over a caller who left."""
        count = 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                self.disconnects.put("plain")
                self.bytes_read.put(count)
                raise RuntimeError("the caller left")
            count += len(message["body"])
            if not message["more_body"]:
                break
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": str(count).encode()})

    async def stubborn(self, scope: Any, receive: Any, send: Any) -> None:
        """Plain ASGI that asks again after it heard that the caller left, and answers all the same."""
        for _ in range(2):
            while (await receive())["type"] != "http.disconnect":
                pass
            self.disconnects.put("stubborn")
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"all the same"})
        self.disconnects.put("answered")


@pytest.fixture
def heard() -> Heard:
    return Heard()


@pytest.fixture
def port(heard: Heard) -> Iterator[int]:
    """Its callers may be as slow as they like."""
    with serving(BodyLimits(heard.app, most_bytes=MOST_BYTES, seconds=LATE)) as port:
        yield port


@pytest.fixture
def hasty_port(heard: Heard) -> Iterator[int]:
    """Its callers have no time."""
    with serving(BodyLimits(heard.app, most_bytes=MOST_BYTES, seconds=SOON)) as port:
        yield port


@contextlib.contextmanager
def connected(port: int, head: str, *lines: str) -> Iterator[socket.socket]:
    """A connection on which a request's head has been sent."""
    with socket.create_connection((HOST, port), PATIENCE) as connection:
        text = "\r\n".join([f"{head} HTTP/1.1", f"Host: {HOST}", *lines, "", ""])
        connection.sendall(text.encode())
        yield connection


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def answer_of(connection: socket.socket) -> http.client.HTTPResponse:
    response = http.client.HTTPResponse(connection)
    response.begin()
    return response


def expect_refusal(connection: socket.socket, status: int, words: str) -> None:
    """It has the status, says why as FastAPI does, and is the last thing on its connection."""
    response = answer_of(connection)
    assert response.status == status
    assert response.headers["content-type"] == "application/json"
    assert response.headers["connection"] == "close"
    assert words in json.loads(response.read())["detail"]
    # A server that has refused reads on for a moment, unless it hears that no more will come.
    connection.shutdown(socket.SHUT_WR)
    assert connection.recv(1) == b""


CHUNKED = "Transfer-Encoding: chunked"


@pytest.mark.parametrize("size", [0, 1, MOST_BYTES])
def test_a_body_up_to_the_limit_arrives_whole(port: int, size: int) -> None:
    assert httpx.post(f"http://{HOST}:{port}/length", content=b"x" * size).json() == size


def test_a_chunked_body_up_to_the_limit_arrives_whole(port: int) -> None:
    parts = iter([b"x" * 1000] * (MOST_BYTES // 1000))

    assert httpx.post(f"http://{HOST}:{port}/length", content=parts).json() == MOST_BYTES


def test_a_declared_length_beyond_the_limit_is_refused_before_any_of_it_is_sent(port: int) -> None:
    with connected(port, "POST /length", f"Content-Length: {MOST_BYTES + 1}") as connection:
        expect_refusal(connection, 413, f"larger than {MOST_BYTES} bytes")


def test_the_connection_of_a_refused_caller_is_closed_without_their_help(port: int) -> None:
    with connected(port, "POST /length", f"Content-Length: {MOST_BYTES + 1}") as connection:
        assert b"larger than" in answer_of(connection).read()

        assert connection.recv(1) == b""


def test_a_caller_who_asks_before_sending_is_refused_and_not_told_to_go_on(port: int) -> None:
    lines = f"Content-Length: {MOST_BYTES + 1}", "Expect: 100-continue"
    with connected(port, "POST /length", *lines) as connection:
        assert connection.recv(12, socket.MSG_PEEK | socket.MSG_WAITALL) == b"HTTP/1.1 413"
        expect_refusal(connection, 413, "larger than")


@pytest.mark.parametrize("path", ["/length", "/prompt", "/plain/"])
def test_a_chunked_body_is_refused_where_it_passes_the_limit(port: int, path: str) -> None:
    with connected(port, f"POST {path}", "Content-Type: application/json", CHUNKED) as connection:
        connection.sendall(chunk(b"x" * MOST_BYTES) + chunk(b"x"))

        expect_refusal(connection, 413, f"larger than {MOST_BYTES} bytes")


def test_a_client_that_sends_everything_first_is_not_cut_off_before_it_reads(port: int) -> None:
    """Closed at once, its connection would be reset under its hands."""
    size = 10_000_000
    with connected(port, "POST /length", f"Content-Length: {size}") as connection:
        connection.sendall(bytes(size))

        expect_refusal(connection, 413, "larger than")


def test_100_mb_are_refused_to_an_ordinary_client(port: int) -> None:
    response = httpx.post(f"http://{HOST}:{port}/length", content=bytes(100_000_000))

    assert response.status_code == 413
    assert "larger than" in response.json()["detail"]


def test_an_application_reads_no_more_than_the_limit_and_what_reaches_the_server_at_once(
    heard: Heard, port: int
) -> None:
    with connected(port, "POST /plain/", CHUNKED) as connection, contextlib.suppress(OSError):
        for _ in range(100):
            connection.sendall(chunk(b"x" * MOST_BYTES))

    assert heard.disconnects.get(timeout=PATIENCE) == "plain"
    assert heard.bytes_read.get(timeout=PATIENCE) <= MOST_BYTES


def test_an_application_that_does_not_give_up_changes_nothing(heard: Heard, port: int) -> None:
    with connected(port, "POST /stubborn/", CHUNKED) as connection:
        connection.sendall(chunk(b"x" * (MOST_BYTES + 1)))

        for said in ("stubborn", "stubborn", "answered"):
            assert heard.disconnects.get(timeout=PATIENCE) == said
        expect_refusal(connection, 413, "larger than")


def test_an_application_that_trips_over_a_refused_caller_is_no_news(
    port: int, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO), connected(port, "POST /plain/", CHUNKED) as connection:
        connection.sendall(chunk(b"x" * (MOST_BYTES + 1)))
        expect_refusal(connection, 413, "larger than")

    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


@pytest.mark.parametrize("path", ["/length", "/prompt", "/plain/"])
def test_a_body_that_drips_in_is_refused_when_its_time_is_over(hasty_port: int, path: str) -> None:
    lines = "Content-Type: application/json", "Content-Length: 1000"
    with connected(hasty_port, f"POST {path}", *lines) as connection:
        connection.settimeout(0.02)
        answered = False
        ends = time.monotonic() + PATIENCE
        while not answered and time.monotonic() < ends:
            connection.sendall(b"x")
            with contextlib.suppress(TimeoutError):
                answered = bool(connection.recv(1, socket.MSG_PEEK))
        connection.settimeout(PATIENCE)

        expect_refusal(connection, 408, f"did not arrive within {SOON:g} seconds")


def test_a_body_that_never_begins_is_refused_when_its_time_is_over(hasty_port: int) -> None:
    with connected(hasty_port, "POST /length", "Content-Length: 5") as connection:
        expect_refusal(connection, 408, "did not arrive")


def test_a_slow_body_that_nobody_waits_for_is_no_reason_to_refuse(hasty_port: int) -> None:
    with connected(hasty_port, "POST /unread", "Content-Length: 5") as connection:
        response = answer_of(connection)

        assert (response.status, response.read()) == (200, b'"answered"')


def test_an_answer_that_has_begun_is_not_ended_by_a_slow_body(hasty_port: int) -> None:
    with connected(hasty_port, "POST /early", CHUNKED) as connection:
        response = answer_of(connection)
        assert response.read1() == b"begun "
        time.sleep(2 * SOON)
        connection.sendall(chunk(b"late") + chunk(b""))

        assert response.read() == b"late"


def test_a_body_that_grows_too_large_under_an_answer_ends_it(port: int) -> None:
    with connected(port, "POST /early", CHUNKED) as connection:
        response = answer_of(connection)
        assert response.read1() == b"begun "
        connection.sendall(chunk(b"x" * (MOST_BYTES + 1)))

        with pytest.raises(http.client.IncompleteRead):
            response.read()


def test_events_pass_one_by_one_for_longer_than_a_body_may_take(
    heard: Heard, hasty_port: int
) -> None:
    ends = time.monotonic() + 3 * SOON
    with httpx.stream("GET", f"http://{HOST}:{hasty_port}/events", timeout=PATIENCE) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        assert "content-length" not in response.headers
        for _ in response.iter_lines():
            if time.monotonic() > ends:
                break

    assert heard.disconnects.get(timeout=PATIENCE) == "events"


def test_a_caller_who_leaves_within_a_body_reaches_the_application(heard: Heard, port: int) -> None:
    with connected(port, "POST /plain/", "Content-Length: 10") as connection:
        connection.sendall(b"12345")

    assert heard.disconnects.get(timeout=PATIENCE) == "plain"
    assert heard.bytes_read.get(timeout=PATIENCE) <= 5


def test_the_server_goes_on_after_refusals(port: int) -> None:
    for _ in range(3):
        with connected(port, "POST /length", "Content-Length: 999999999") as connection:
            assert answer_of(connection).status == 413

    assert httpx.post(f"http://{HOST}:{port}/prompt", json={"prompt": "a fox"}).json() == "a fox"
