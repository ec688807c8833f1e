"""Callers who ask and do not read, at a real server that uses the gateway's protocol with less patience."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from typing import cast

import pytest
import uvicorn
from fastapi import FastAPI
from fastapi.responses import Response, StreamingResponse

from gateway import connections
from gateway.connections import Connection
from tests.gateway.test_connections import HOST, LIVE, PATIENCE_S, answered, connect

PAGE = bytes(30_000)
# More than Linux takes from us for a reader on this machine, which grows to some 2.5 MB.
LARGE = bytes(4_000_000)
ENOUGH = 300  # pages, which are more than that too
app = FastAPI()
asked: set[str] = set()


@app.get("/live")
async def live() -> str:
    return "live"


@app.get("/page")
async def page(by: str = "") -> Response:
    asked.add(by)
    return Response(PAGE)


@app.get("/large")
async def large() -> Response:
    return Response(LARGE)


@app.get("/endless")
async def endless() -> StreamingResponse:
    async def pages() -> AsyncIterator[bytes]:
        while True:
            yield PAGE
            await asyncio.sleep(0)

    return StreamingResponse(pages())


@dataclass
class Serving:
    port: int
    server: uvicorn.Server

    @property
    def held(self) -> list[Connection]:
        return cast("list[Connection]", list(self.server.server_state.connections))


@contextlib.contextmanager
def serving(loop: str = "uvloop") -> Iterator[Serving]:
    config = uvicorn.Config(app, http=Connection, log_config=None, lifespan="off", loop=loop)
    config.timeout_keep_alive = 1
    server = uvicorn.Server(config)
    with socket.create_server((HOST, 0)) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield Serving(listener.getsockname()[1], server)
        finally:
            server.should_exit = server.force_exit = True
            thread.join()


@pytest.fixture(params=["uvloop", "asyncio"])
def hasty(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Serving]:
    """It has three places, and cuts off who does not read."""
    monkeypatch.setattr(connections, "MOST_CONNECTIONS", 3)
    monkeypatch.setattr(connections, "STALLED_S", 0.5)
    with serving(request.param) as here:
        yield here


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[Serving]:
    """It has three places, and waits for who does not read."""
    monkeypatch.setattr(connections, "MOST_CONNECTIONS", 3)
    with serving() as here:
        yield here


def until(happened: Callable[[], bool]) -> None:
    ends = time.monotonic() + PATIENCE_S
    while not happened():
        assert time.monotonic() < ends
        time.sleep(0.01)


def lazy(port: int, first: bytes = b"") -> socket.socket:
    """A connection whose own side takes little that is not read."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16_384)
    connection.settimeout(PATIENCE_S)
    connection.connect((HOST, port))
    connection.sendall(first)
    return connection


def get(target: str, *headers: str) -> bytes:
    return "\r\n".join((f"GET {target} HTTP/1.1", "Host: x", *headers, "", "")).encode()


def read_all(connection: socket.socket) -> int:
    """How many bytes come until it is closed."""
    size = 0
    with contextlib.suppress(ConnectionError):
        while piece := connection.recv(1_000_000):
            size += len(piece)
    return size


def ask_until_some_is_left(here: Serving, reader: socket.socket, *headers: str) -> int:
    """Ask for one page after the other; returns how many were asked for when not all of one could be sent."""
    count = 0
    [connection] = here.held
    while not connection.transport.get_write_buffer_size():
        before = here.server.server_state.total_requests
        reader.sendall(get("/page", *headers))
        count += 1
        until(lambda: here.server.server_state.total_requests > before)  # noqa: B023 - called at once
    assert connection.is_idle
    assert not connection.flow.write_paused
    return count


def test_who_asks_on_and_never_reads_is_cut_off(
    hasty: Serving, caplog: pytest.LogCaptureFixture
) -> None:
    asked.clear()
    with contextlib.ExitStack() as stack:
        readers = [
            stack.enter_context(lazy(hasty.port, get(f"/page?by={name}") * ENOUGH))
            for name in ("one", "two", "three")
        ]
        until(lambda: len(asked) == 3)
        stalled = set(hasty.held)

        def has_a_place() -> bool:
            with connect(hasty.port, LIVE) as newcomer, contextlib.suppress(OSError):
                return answered(newcomer) == 200
            return False

        until(has_a_place)
        until(lambda: stalled.isdisjoint(hasty.held))
        assert [read_all(reader) < ENOUGH * len(PAGE) for reader in readers] == [True] * 3
        until(lambda: not hasty.server.server_state.tasks)
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []


def test_a_stream_ends_with_who_does_not_read_it(hasty: Serving) -> None:
    with lazy(hasty.port, get("/endless")):
        until(lambda: bool(hasty.server.server_state.tasks))
        until(lambda: not hasty.held and not hasty.server.server_state.tasks)


@pytest.mark.parametrize("last", [(), ("Connection: close",)])
def test_what_is_left_of_a_whole_answer_is_not_kept_for_ever(
    hasty: Serving, last: tuple[str, ...]
) -> None:
    with lazy(hasty.port) as reader:
        until(lambda: len(hasty.held) == 1)
        count = ask_until_some_is_left(hasty, reader)
        with contextlib.suppress(ConnectionError):
            reader.sendall(get("/live", *last))
        until(lambda: not hasty.held)
        assert read_all(reader) < count * len(PAGE)


def test_a_slow_reader_gets_all_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Too slow for Linux to take more from the server between two looks: it does when a third of its own is gone."""
    # Longer than this machine may stand still.
    monkeypatch.setattr(connections, "STALLED_S", 1.5)
    pause = threading.Event()
    size = 0
    with serving() as here, lazy(here.port, get("/large", "Connection: close")) as reader:
        while piece := reader.recv(65_536):
            size += len(piece)
            pause.wait(0.15 * len(piece) / 65_536)
    assert size > len(LARGE)


def test_what_is_left_of_an_answer_gives_its_place_up_at_once(small: Serving) -> None:
    with contextlib.ExitStack() as stack:
        reader = stack.enter_context(lazy(small.port))
        until(lambda: len(small.held) == 1)
        [first] = small.held
        count = ask_until_some_is_left(small, reader)
        for _ in range(3):
            newcomer = stack.enter_context(connect(small.port, LIVE))
            assert answered(newcomer) == 200
        assert first not in small.held
        assert read_all(reader) < count * len(PAGE)
