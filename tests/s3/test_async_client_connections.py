"""Handshakes that fail, bodies that nobody reads, and clients that are closed: each ends in words, and in time."""

from __future__ import annotations

import asyncio
import socket
import ssl
import threading
from collections.abc import Iterator

import pytest

from s3 import CERTIFICATE_REFUSED
from s3.async_client import AsyncClient, S3Error
from tests.s3.test_async_client import get, with_client
from tests.s3.test_async_client_faults import (
    CONTENT,
    TIMEOUT_S,
    Answering,
    authority,
    found,
    in_turn,
    pauses,
    server,
    storage_at,
)
from tests.support.authority import Authority
from tests.support.object_server import Head, LoopbackServer, Wire, s3_error
from tests.support.tls_front import TlsFront

# Fixtures: pytest finds them by their names.
__all__ = ["authority", "pauses", "server"]

# More than the sockets on both sides hold for a server that reads nothing.
LARGE = bytes(8 * 1024 * 1024)
CLOSED = "the client is closed"


# Handshakes


class SpeaksNoTls(TlsFront):
    """Answers the first `times` connections in plain HTTP, as a server does that was told https:// for http://."""

    times = 0

    def serve(self, client: socket.socket) -> None:
        with self._lock:
            self.times -= 1
            is_plain = self.times >= 0
        if not is_plain:
            super().serve(client)
            return
        with self._lock:
            self.connections += 1
        client.recv(65536)
        client.sendall(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")


def of_no_common_cipher(authority: Authority) -> ssl.SSLContext:
    """What ends the handshake with a fatal alert: ciphers for RSA alone, and a certificate that is none."""
    context = authority.context("localhost", version=ssl.TLSVersion.TLSv1_2)
    context.set_ciphers("ECDHE-RSA-AES128-GCM-SHA256")
    return context


def test_a_handshake_that_ends_with_an_alert_is_tried_again(
    server: Answering, authority: Authority, pauses: list[float]
) -> None:
    contexts = [of_no_common_cipher(authority), authority.context("localhost")]

    with TlsFront(server, lambda number: contexts[number - 1]) as front:
        assert get(storage_at(front), "bucket", "key").body == CONTENT

        assert front.connections == 2
    assert len(pauses) == 1


def test_a_server_that_speaks_no_tls_for_a_moment_is_tried_again(
    server: Answering, authority: Authority, pauses: list[float]
) -> None:
    with SpeaksNoTls(server, lambda _: authority.context("localhost")) as front:
        front.times = 2
        assert get(storage_at(front), "bucket", "key").body == CONTENT

        assert front.connections == 3


def test_a_handshake_that_keeps_failing_is_said_with_what_to_check(
    server: Answering, authority: Authority, pauses: list[float]
) -> None:
    context = of_no_common_cipher(authority)

    with TlsFront(server, lambda _: context) as front:
        with pytest.raises(S3Error) as caught:
            get(storage_at(front), "bucket", "key", attempts=3)

        assert (caught.value.code, str(caught.value)) == ("", str(CERTIFICATE_REFUSED))
        assert front.connections == 3


def test_a_certificate_for_another_host_is_refused_at_once(
    server: Answering, authority: Authority, pauses: list[float]
) -> None:
    context = authority.context("elsewhere.example")

    with TlsFront(server, lambda _: context) as front:
        with pytest.raises(S3Error) as caught:
            get(storage_at(front), "bucket", "key")

        assert str(caught.value) == str(CERTIFICATE_REFUSED)
        assert (front.connections, front.requests, pauses) == (1, [], [])


# Bodies


class ReadsNoBody(LoopbackServer):
    """Reads each request's head and nothing behind it, until the client goes."""

    def __init__(self) -> None:
        self.heads: list[Head] = []
        self._ending = threading.Event()
        super().__init__("reads-no-body")

    def serve(self, client: socket.socket) -> None:
        head = Wire(client).head()
        assert head is not None
        with self._lock:
            self.heads.append(head)
        self._ending.wait(TIMEOUT_S)

    def close(self) -> None:
        self._ending.set()
        super().close()


def put_large(server: LoopbackServer) -> None:
    async def write(client: AsyncClient) -> None:
        async with asyncio.timeout(TIMEOUT_S):  # instead of for ever, where no attempt ends
            await client.put("bucket", "key", LARGE, {})

    with_client(storage_at(server), write, attempts=2, read_timeout=0.3)


def test_a_body_that_nobody_reads_ends_with_the_attempt(
    pauses: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("s3.async_client.CONNECT_TIMEOUT", 0.3)

    with ReadsNoBody() as server:
        with pytest.raises(S3Error, match=r"the connection failed \(TimeoutError\)") as caught:
            put_large(server)

        assert caught.value.code == ""
        assert [head.length for head in server.heads] == 2 * [len(LARGE)]
    assert len(pauses) == 1


# Closing


class Held:
    """Answers that are kept back: `asked` once there is a request for one, until `go`."""

    def __init__(self) -> None:
        self.asked = threading.Event()
        self.go = threading.Event()

    def __call__(self, head: Head, number: int) -> bytes:
        self.asked.set()
        self.go.wait(TIMEOUT_S)
        return found()


@pytest.fixture
def held() -> Iterator[Held]:
    held = Held()
    yield held
    held.go.set()


@pytest.mark.parametrize("was_used", [False, True])
def test_a_client_that_is_closed_asks_nothing_and_says_so(
    server: Answering, was_used: bool
) -> None:
    async def ask_when_closed() -> None:
        client = AsyncClient(storage_at(server))
        if was_used:
            await client.get("bucket", "key", limit=100)
        await client.close()
        with pytest.raises(S3Error, match=CLOSED) as caught:
            await client.get("bucket", "key", limit=100)
        assert caught.value.code == ""
        with pytest.raises(S3Error, match=CLOSED):
            await client.put("bucket", "key", LARGE, {})
        assert client._session is None

    asyncio.run(ask_when_closed())

    assert len(server.heads) == int(was_used)


@pytest.mark.parametrize("requests", [1, 3])
def test_closing_ends_in_words_who_waits_for_an_answer_or_for_a_connection(
    held: Held, pauses: list[float], requests: int
) -> None:
    async def ask_and_close() -> list[object]:
        client = AsyncClient(storage_at(server), connections=1)
        asked = [
            asyncio.create_task(client.get("bucket", "key", limit=100)) for _ in range(requests)
        ]
        await asyncio.to_thread(held.asked.wait, TIMEOUT_S)
        await client.close()
        ended = await asyncio.gather(*asked, return_exceptions=True)
        assert client._session is None
        return [*ended]

    with Answering(held) as server:
        ended = asyncio.run(ask_and_close())
        held.go.set()
        server.wait_until_none_is_open()

        assert len(server.heads) == 1
    assert [type(end) for end in ended] == requests * [S3Error]
    assert {str(end).partition(".")[0] for end in ended} == {CLOSED}


def test_who_is_about_to_ask_again_at_closing_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    async def ask_and_close() -> None:
        client = AsyncClient(storage_at(server))
        sleep = asyncio.sleep

        async def close_instead(_: float) -> None:
            await client.close()
            await sleep(0)

        monkeypatch.setattr("s3.async_client.asyncio.sleep", close_instead)
        with pytest.raises(S3Error, match=CLOSED):
            await client.get("bucket", "key", limit=100)

    with Answering(in_turn(s3_error(503, "SlowDown", ""), found())) as server:
        asyncio.run(ask_and_close())

        assert len(server.heads) == 1
