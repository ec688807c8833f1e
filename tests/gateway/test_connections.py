"""Connections on which nothing happens, at a real server that uses the gateway's protocol with shorter waits."""

from __future__ import annotations

import contextlib
import http.client
import socket
import threading
from collections.abc import Iterator

import pytest
import uvicorn
from fastapi import FastAPI, Request

from gateway import connections
from gateway.connections import Connection

HOST = "127.0.0.1"
PATIENCE_S = 30.0
LIVE = b"GET /live HTTP/1.1\r\nHost: x\r\n\r\n"
app = FastAPI()
held, let_go = threading.Event(), threading.Event()


@app.get("/live")
async def live() -> str:
    return "live"


@app.post("/length")
async def length(request: Request) -> int:
    return len(await request.body())


@app.get("/held")
def hold() -> str:
    held.set()
    let_go.wait(PATIENCE_S)
    return "at last"


@contextlib.contextmanager
def serving() -> Iterator[int]:
    config = uvicorn.Config(app, http=Connection, log_config=None, lifespan="off")
    server = uvicorn.Server(config)
    with socket.create_server((HOST, 0)) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            let_go.set()
            server.should_exit = True
            thread.join()


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Its port; it has little time for those who do not speak."""
    monkeypatch.setattr(connections, "HEAD_WITHIN_S", 0.3)
    with serving() as port:
        yield port


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Its port; it has three places."""
    monkeypatch.setattr(connections, "MOST_CONNECTIONS", 3)
    with serving() as port:
        yield port


def connect(port: int, first: bytes = b"") -> socket.socket:
    connection = socket.create_connection((HOST, port), PATIENCE_S)
    connection.sendall(first)
    return connection


def answered(connection: socket.socket) -> int:
    response = http.client.HTTPResponse(connection)
    response.begin()
    response.read()
    return response.status


def is_closed(connection: socket.socket) -> bool:
    """Waits for it."""
    try:
        return connection.recv(1) == b""
    except ConnectionError:
        return True


@pytest.mark.parametrize("first", [b"", b"G", b"GET /live HTTP/1.1\r\nHost: x\r\nX-Slow: "])
def test_who_begins_no_request_in_time_is_let_go(hasty: int, first: bytes) -> None:
    with connect(hasty, first) as connection:
        assert is_closed(connection)


def test_a_head_that_drips_is_let_go_however_often_a_byte_comes(hasty: int) -> None:
    with connect(hasty, b"GET /live HTTP/1.1\r\nHost: x\r\nX-Slow: ") as connection:
        connection.settimeout(0.02)
        with contextlib.suppress(ConnectionError):
            while True:
                connection.sendall(b"a")
                with contextlib.suppress(TimeoutError):
                    if connection.recv(1) == b"":
                        break


def test_a_second_request_that_does_not_go_on_is_let_go_too(hasty: int) -> None:
    with connect(hasty, LIVE) as connection:
        assert answered(connection) == 200
        connection.sendall(b"GET /live HT")
        assert is_closed(connection)


def test_who_has_asked_is_waited_for(hasty: int) -> None:
    """The deadline is the head's: not the body's, nor the answer's, nor that of the pause between two requests."""
    head = b"POST /length HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n"
    silent = threading.Event()
    with connect(hasty, head + b"a") as connection:
        silent.wait(0.5)
        connection.sendall(b"b")
        assert answered(connection) == 200
        silent.wait(0.5)
        connection.sendall(LIVE)
        assert answered(connection) == 200


@pytest.mark.parametrize(
    "first",
    [
        b"GET /live HTTP/1.1\r\nHost: x\r\nX-Endless: ",
        b"GET /live HTTP/1.1\r\nHost: x\r\n",
        b"GET /",
        b"POST /length HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n1;endless=",
        b"POST /length HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\nX-End: ",
    ],
)
def test_what_is_no_body_may_not_be_endless(small: int, first: bytes) -> None:
    with connect(small, first) as connection:
        for _ in range(100):  # what is read at once with the end of a head is not counted
            with contextlib.suppress(ConnectionError):
                connection.sendall(b"a: b\r\n" * 2000 if first.endswith(b"\r\n") else b"a" * 12_000)
        with contextlib.suppress(ConnectionError):
            assert answered(connection) == 431
        assert is_closed(connection)
    with connect(small, LIVE) as connection:
        assert answered(connection) == 200


def test_a_large_body_is_no_head(small: int) -> None:
    size = 4 * connections.MOST_HEAD_BYTES
    head = b"POST /length HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % size
    with connect(small, head + bytes(size)) as connection:
        assert answered(connection) == 200


def test_who_asks_nothing_makes_room_and_who_waits_for_an_answer_does_not(small: int) -> None:
    held.clear()
    let_go.clear()
    with contextlib.ExitStack() as stack:
        asking = stack.enter_context(connect(small, b"GET /held HTTP/1.1\r\nHost: x\r\n\r\n"))
        assert held.wait(PATIENCE_S)
        first = stack.enter_context(connect(small, LIVE))
        assert answered(first) == 200
        second = stack.enter_context(connect(small, LIVE))
        assert answered(second) == 200
        for _ in range(5):
            newest = stack.enter_context(connect(small, LIVE))
            assert answered(newest) == 200
        assert is_closed(first)
        assert is_closed(second)
        let_go.set()
        assert answered(asking) == 200


def test_where_everybody_waits_for_an_answer_the_newest_has_no_place(small: int) -> None:
    let_go.clear()
    with contextlib.ExitStack() as stack:
        asking = []
        for _ in range(3):
            held.clear()
            head = b"GET /held HTTP/1.1\r\nHost: x\r\n\r\n"
            asking.append(stack.enter_context(connect(small, head)))
            assert held.wait(PATIENCE_S)
        assert is_closed(stack.enter_context(connect(small)))
        let_go.set()
        assert [answered(connection) for connection in asking] == [200] * 3
