"""What passes is asked again, what stays ends in words, and no connection is made too many or left behind."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from demo.s3 import EmbeddedS3, Keypair
from s3 import CERTIFICATE_REFUSED, UNREACHED
from s3.async_client import FIRST_PAUSE_S, LONGEST_PAUSE_S, AsyncClient, S3Error
from settings import StorageSettings
from tests.s3.test_async_client import bucket, get, put, with_client
from tests.support.authority import Authority
from tests.support.fault_proxy import FaultProxy, scripted
from tests.support.faults import BEFORE_HEAD, Fault, FaultKind
from tests.support.object_server import Head, LoopbackServer, Wire, s3_error, status_line
from tests.support.records import storage_of
from tests.support.tls_front import ConnectProxy, TlsFront

__all__ = ["bucket"]  # fixtures: pytest finds them by their names

TIMEOUT_S = 60.0
CONTENT = b"content"
CUT = (FaultKind.RESET, FaultKind.TRUNCATE)
BROKEN = (FaultKind.REFUSE, FaultKind.HALF_HEADERS, FaultKind.GARBAGE)


# Servers


def found(body: bytes = CONTENT) -> bytes:
    return Head(status_line(200), (("Content-Length", str(len(body))),)).encode() + body


Answer = Callable[[Head, int], bytes | None]


def in_turn(*answers: bytes | None) -> Answer:
    """One after the other, the last of them for ever."""
    return lambda _, number: answers[min(number, len(answers)) - 1]


class Answering(LoopbackServer):
    """Answers what `answer` makes of a request and its number, from 1; where that is None, the connection ends.

    `single` closes each connection after one answer, without having said so.
    """

    def __init__(self, answer: Answer, *, single: bool = False) -> None:
        self._answer = answer
        self._single = single
        self._changed = threading.Condition()
        self._open = 0
        self.connections = 0
        self.heads: list[Head] = []
        super().__init__("answering")

    def serve(self, client: socket.socket) -> None:
        with self._changed:
            self.connections += 1
            self._open += 1
        try:
            wire = Wire(client)
            while (head := wire.head()) is not None:
                for _ in wire.request_body(head):
                    pass
                with self._changed:
                    self.heads.append(head)
                    number = len(self.heads)
                answer = self._answer(head, number)
                client.sendall(answer or b"")
                if answer is None or self._single:
                    return
        finally:
            self.release(client)
            with self._changed:
                self._open -= 1
                self._changed.notify_all()

    def wait_until_none_is_open(self) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: not self._open, TIMEOUT_S)


def storage_at(server: LoopbackServer, s3: EmbeddedS3 | None = None) -> StorageSettings:
    """With the keys of the one that is behind it; else with some at which nobody looks."""
    keys = s3.admin if s3 else Keypair("key", "hunter2")
    return StorageSettings(
        access_key_id=keys.access_key_id,
        secret_access_key=keys.secret_access_key,
        endpoint_url=server.endpoint_url,
    )


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What would have been waited for, in seconds."""
    asked: list[float] = []
    sleep = asyncio.sleep

    async def record(seconds: float, *_: object) -> None:
        asked.append(seconds)
        await sleep(0)

    monkeypatch.setattr("s3.async_client.asyncio.sleep", record)
    return asked


# Asking again


@pytest.mark.parametrize(
    "fault",
    [
        *(Fault(FaultKind.STATUS, status=status) for status in (400, 429, 500, 502, 503, 504)),
        *(Fault(kind, at=at) for kind in CUT for at in (BEFORE_HEAD, 1)),
        *(Fault(kind) for kind in BROKEN),
    ],
    ids=lambda fault: f"{fault.kind}-{fault.at}-{fault.status or ''}",
)
def test_a_fault_that_passes_costs_attempts_and_nothing_else(
    s3: EmbeddedS3, bucket: str, pauses: list[float], fault: Fault
) -> None:
    twice_each = scripted([("PUT *", fault, 2, 0), ("GET *", fault, 2, 0)])

    with FaultProxy(s3.endpoint_url, twice_each) as proxy:
        put(storage_at(proxy, s3), bucket, "a b+c", CONTENT)
        answer = get(storage_at(proxy, s3), bucket, "a b+c")

    assert answer.body == CONTENT
    assert [record.method for record in proxy.requests] == 3 * ["PUT"] + 3 * ["GET"]


@pytest.mark.parametrize(
    ("status", "code"),
    [(501, "NotImplemented"), (403, "AccessDenied"), (409, "Conflict"), (307, "Redirect")],
)
def test_what_asking_again_would_not_change_is_asked_once(
    pauses: list[float], status: int, code: str
) -> None:
    elsewhere = (("Location", "/other"),)
    with Answering(in_turn(s3_error(status, code, "no", fields=elsewhere))) as server:
        with pytest.raises(S3Error) as caught:
            put(storage_at(server), "bucket", "key", CONTENT)

        assert caught.value.code == code
        assert len(server.heads) == 1


def test_a_server_that_stays_busy_is_asked_ever_more_slowly(pauses: list[float]) -> None:
    with Answering(in_turn(s3_error(503, "SlowDown", "busy"))) as server:
        with pytest.raises(S3Error, match="fewer requests at once") as caught:
            get(storage_at(server), "bucket", "key", attempts=4)

        assert caught.value.code == "SlowDown"
        assert len(server.heads) == 4
    assert pauses == [pytest.approx(FIRST_PAUSE_S * doubled, rel=0.5) for doubled in (1, 2, 4)]


@pytest.mark.parametrize(
    ("asked", "seconds"),
    [("7", 7.0), ("0", 0.0), ("20", LONGEST_PAUSE_S), ("Thu, 01 Jan 2026 00:00:05 GMT", 5.0)],
)
def test_retry_after_is_what_is_waited_for_within_reason(
    pauses: list[float], asked: str, seconds: float
) -> None:
    fields = (("Retry-After", asked), ("Date", "Thu, 01 Jan 2026 00:00:00 GMT"))

    with Answering(in_turn(s3_error(503, "SlowDown", "", fields=fields), found())) as server:
        get(storage_at(server), "bucket", "key")

    assert pauses == [pytest.approx(seconds, rel=0.25)]
    assert pauses[0] >= seconds


@pytest.mark.parametrize(
    ("asked", "options"), [("86400", {}), ("21", {}), ("2.1", {"longest_pause": 2})]
)
def test_a_server_that_asks_for_too_long_a_wait_is_not_waited_for(
    pauses: list[float], asked: str, options: dict[str, float]
) -> None:
    busy = s3_error(503, "SlowDown", "", fields=(("Retry-After", asked),))

    with Answering(in_turn(busy, found())) as server:
        with pytest.raises(S3Error, match="fewer requests at once") as caught:
            get(storage_at(server), "bucket", "key", **options)

        assert caught.value.code == "SlowDown"
        assert len(server.heads) == 1
    assert pauses == []


def test_no_pause_of_its_own_is_much_longer_than_the_longest(pauses: list[float]) -> None:
    with Answering(in_turn(s3_error(503, "SlowDown", ""))) as server, pytest.raises(S3Error):
        get(storage_at(server), "bucket", "key", attempts=10, longest_pause=2)

    assert len(pauses) == 9
    assert max(pauses) <= 1.5 * 2


# Connections


def test_a_server_that_is_not_there_is_tried_and_then_said(pauses: list[float]) -> None:
    with Answering(in_turn(None)) as gone:
        storage = storage_at(gone)

    with pytest.raises(S3Error) as caught:
        get(storage, "bucket", "key", attempts=3)

    assert (caught.value.code, str(caught.value)) == ("", str(UNREACHED))
    assert len(pauses) == 2


@pytest.mark.parametrize("fault", [FaultKind.STALL, FaultKind.RESET, FaultKind.GARBAGE])
@pytest.mark.parametrize("at", [BEFORE_HEAD, 1])
def test_a_connection_that_keeps_failing_is_said_without_a_secret(
    s3: EmbeddedS3, bucket: str, admin: Any, pauses: list[float], fault: FaultKind, at: int
) -> None:
    admin.put_object(Bucket=bucket, Key="key", Body=CONTENT)

    with FaultProxy(s3.endpoint_url, lambda _: Fault(fault, at=at, seconds=30.0)) as proxy:
        with pytest.raises(S3Error, match="the connection failed") as caught:
            get(storage_at(proxy, s3), bucket, "key", attempts=2, read_timeout=0.5)

        # aiohttp, too, sends once more what a connection that was closed has swallowed.
        assert 2 <= len(proxy.requests) <= 4
    assert s3.admin.secret_access_key not in str(caught.value)
    assert s3.admin.access_key_id not in str(caught.value)


@pytest.mark.parametrize("closes", ["while idle", "when asked"])
def test_a_kept_connection_that_the_server_has_closed_costs_no_attempt(closes: str) -> None:
    answer = in_turn(found()) if closes == "while idle" else in_turn(found(), None, found())

    async def ask_twice(client: AsyncClient) -> bytes:
        await client.get("bucket", "key", limit=100)
        if closes == "while idle":
            await asyncio.to_thread(server.wait_until_none_is_open)
        return (await client.get("bucket", "key", limit=100)).body

    with Answering(answer, single=closes == "while idle") as server:
        assert with_client(storage_at(server), ask_twice, attempts=1) == CONTENT
        assert server.connections == 2


@pytest.mark.filterwarnings("error::ResourceWarning")
def test_many_at_once_keep_to_the_connections_they_may_have_and_leave_none() -> None:
    together = threading.Barrier(3)  # answers come once three are asked for at the same time

    def answer(head: Head, number: int) -> bytes:
        together.wait(TIMEOUT_S)
        return found(head.start.split()[1].encode())

    async def ask_and_close() -> list[bytes]:
        async with AsyncClient(storage_at(server), connections=3) as client:
            asked = (client.get("bucket", f"{number}", limit=100) for number in range(12))
            bodies = [got.body for got in await asyncio.gather(*asked)]
        await asyncio.to_thread(server.wait_until_none_is_open)
        await client.close()  # a second time
        return bodies

    with Answering(answer) as server:
        assert asyncio.run(ask_and_close()) == [b"/bucket/%d" % number for number in range(12)]
        assert server.connections == 3


def test_an_object_of_untold_length_is_read_up_to_the_limit_and_no_further() -> None:
    chunked = Head(status_line(200), (("Transfer-Encoding", "chunked"),)).encode()
    chunked += b"4\r\n0123\r\n6\r\n456789\r\n0\r\n\r\n"

    with Answering(in_turn(chunked)) as server:
        assert get(storage_at(server), "bucket", "key", limit=10).body == b"0123456789"
        with pytest.raises(S3Error, match="more than 9 bytes") as caught:
            get(storage_at(server), "bucket", "key", limit=9)

    assert caught.value.code == "EntityTooLarge"


# Clocks


AHEAD = "Tue, 01 Jan 2126 00:00:00 GMT"


def skewed(date: str | None) -> bytes:
    fields = (("Date", date),) if date else ()
    return s3_error(403, "RequestTimeTooSkewed", "too far", fields=fields)


def test_a_clock_that_is_off_is_corrected_and_said_once_for_all(caplog: Any) -> None:
    together = threading.Barrier(4)

    def answer(head: Head, number: int) -> bytes:
        if number <= 4:
            together.wait(TIMEOUT_S)
            return skewed(AHEAD)
        return found()

    async def ask(client: AsyncClient) -> None:
        await asyncio.gather(*(client.get("bucket", "key", limit=100) for _ in range(4)))

    with Answering(answer) as server:
        with_client(storage_at(server), ask)

        dates = [head.get("x-amz-date") or "" for head in server.heads]
    assert [date.startswith("21260101T00") for date in dates] == 4 * [False] + 4 * [True]
    assert caplog.text.count("Set the clock (NTP)") == 1


@pytest.mark.parametrize(("date", "requests"), [(None, 1), ("yesterday", 1), (AHEAD, 2)])
def test_a_server_that_no_time_satisfies_is_given_up(date: str | None, requests: int) -> None:
    with Answering(in_turn(skewed(date))) as server:
        with pytest.raises(S3Error, match="clock is too far") as caught:
            get(storage_at(server), "bucket", "key", attempts=2)

        assert caught.value.code == "RequestTimeTooSkewed"
        assert len(server.heads) == requests


# TLS and proxies


@pytest.fixture
def authority(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Authority:
    """The one that is trusted."""
    authority = Authority(tmp_path / "trusted")
    monkeypatch.setenv("AWS_CA_BUNDLE", str(authority.bundle))
    return authority


@pytest.fixture
def server() -> Iterator[Answering]:
    with Answering(in_turn(found())) as server:
        yield server


def test_a_server_whose_authority_is_in_the_bundle_is_asked_over_tls(
    server: Answering, authority: Authority
) -> None:
    context = authority.context("localhost")

    with TlsFront(server, lambda _: context) as front:
        assert get(storage_at(front), "bucket", "key").body == CONTENT


@pytest.mark.parametrize("by_proxy", [False, True])
def test_an_unknown_authority_is_refused_at_once(
    server: Answering, authority: Authority, tmp_path: Path, by_proxy: bool, monkeypatch: Any
) -> None:
    context = Authority(tmp_path / "unknown").context("localhost")

    with TlsFront(server, lambda _: context) as front, ConnectProxy() as proxy:
        monkeypatch.setenv("HTTPS_PROXY", proxy.endpoint_url if by_proxy else "")
        with pytest.raises(S3Error) as caught:
            get(storage_at(front), "bucket", "key")

        assert str(caught.value) == str(CERTIFICATE_REFUSED)
        assert (front.connections, front.requests, len(proxy.targets)) == (1, [], int(by_proxy))


@pytest.mark.parametrize("content", [None, b"", b"no certificate"])
def test_a_bundle_that_cannot_be_used_is_named(
    server: Answering, authority: Authority, content: bytes | None
) -> None:
    authority.bundle.unlink()
    if content is not None:
        authority.bundle.write_bytes(content)

    with (
        TlsFront(server, lambda _: authority.context("localhost")) as front,
        pytest.raises(S3Error, match="AWS_CA_BUNDLE cannot be used"),
    ):
        get(storage_at(front), "bucket", "key")


def test_a_proxy_before_tls_gets_its_password_and_sees_a_name_alone(
    server: Answering, authority: Authority, pauses: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    context = authority.context("localhost")

    with (
        TlsFront(server, lambda _: context) as front,
        ConnectProxy(user="me", password="pass:wörd") as proxy,
    ):
        monkeypatch.setenv("HTTPS_PROXY", f"http://me:pass%3Aw%C3%B6rd@127.0.0.1:{proxy.port}")
        assert get(storage_at(front), "bucket", "key").body == CONTENT
        assert proxy.targets == [f"localhost:{front.port}"]

        monkeypatch.setenv("HTTPS_PROXY", f"http://me:wrong@127.0.0.1:{proxy.port}")
        with pytest.raises(S3Error, match=r"the connection failed \(\w+\)\. Try again"):
            get(storage_at(front), "bucket", "key")


def forward(head: Head, _: int) -> bytes:
    """What the server that a proxy is asked for answers to the request without the proxy's own header."""
    method, url, _version = head.start.split(" ")
    where = urlsplit(url)
    passed = Head(f"{method} {where.path} HTTP/1.0", head.without("proxy-authorization").fields)
    with socket.create_connection((where.hostname, where.port)) as upstream:
        upstream.sendall(passed.encode())
        return b"".join(iter(lambda: upstream.recv(65536), b""))


@pytest.mark.parametrize("no_proxy", ["", "127.0.0.1"])
def test_a_plain_proxy_gets_its_password_and_passes_on_what_was_signed(
    s3: EmbeddedS3, bucket: str, admin: Any, monkeypatch: pytest.MonkeyPatch, no_proxy: str
) -> None:
    admin.put_object(Bucket=bucket, Key="a b+c//é", Body=CONTENT)

    with Answering(forward) as proxy:
        monkeypatch.setenv("HTTP_PROXY", f"http://Aladdin:open%20sesame@127.0.0.1:{proxy.port}")
        monkeypatch.setenv("NO_PROXY", no_proxy)
        assert get(storage_of(s3), bucket, "a b+c//é").body == CONTENT

        told = [head.get("proxy-authorization") for head in proxy.heads]
    # The example of RFC 7617
    assert told == ([] if no_proxy else ["Basic QWxhZGRpbjpvcGVuIHNlc2FtZQ=="])
