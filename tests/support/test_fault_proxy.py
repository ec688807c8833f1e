"""The proxy does to a plain client what it says it does, and nothing when told nothing."""

from __future__ import annotations

import contextlib
import http.client
import socket
import threading
from collections.abc import Callable, Iterator
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.config import Config

from demo.s3 import EmbeddedS3
from tests.support.conftest import Proxied
from tests.support.fault_proxy import FaultProxy
from tests.support.faults import BEFORE_HEAD, Fault, FaultKind
from tests.support.object_server import LoopbackServer, ObjectServer, Wire
from tests.support.plain_client import (
    ETAG,
    MIDDLE,
    MODEL,
    MODEL_PATH,
    RANGE,
    ask,
    ask_again,
)

pytestmark = pytest.mark.usefixtures("nothing_is_left")


@contextlib.contextmanager
def raw_request(server: LoopbackServer, path: str = MODEL_PATH) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", server.port), 30) as client:
        client.sendall(f"GET {path} HTTP/1.1\r\nHost: here\r\n\r\n".encode())
        yield client


def everything(client: socket.socket) -> bytes:
    """What arrives until the other side closes."""
    return b"".join(iter(lambda: client.recv(65536), b""))


def head_and_body(client: socket.socket, length: int) -> tuple[bytes, bytes]:
    data = b""
    while len(data.partition(b"\r\n\r\n")[2]) < length:
        piece = client.recv(65536)
        assert piece, "closed too early"
        data += piece
    head, _, body = data.partition(b"\r\n\r\n")
    return head, body


# --- Without faults.


def test_without_a_fault_everything_passes_as_it_is(server: ObjectServer, proxied: Proxied) -> None:
    proxy = proxied()

    for headers in ({}, RANGE, {"If-None-Match": ETAG}, {"If-Match": '"other"'}):
        through, direct = ask(proxy, headers=headers), ask(server, headers=headers)
        assert (through.status, through.body) == (direct.status, direct.body)
        assert through.headers.items() == direct.headers.items()


def test_one_connection_serves_many_requests_of_every_sort(proxied: Proxied) -> None:
    proxy = proxied()
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", proxy.port, 30)) as client:
        assert ask_again(client).body == MODEL
        assert ask_again(client, method="HEAD").headers["Content-Length"] == str(len(MODEL))
        assert ask_again(client, headers={"If-None-Match": ETAG}).status == 304
        assert ask_again(client, "/models/none").status == 404
        assert ask_again(client, method="PUT", body=b"x" * 100_000).status == 405
        assert ask_again(client, headers=RANGE).body == MODEL[1000:2000]

    assert [(record.method, record.range) for record in proxy.requests] == [
        ("GET", None),
        ("HEAD", None),
        ("GET", None),
        ("GET", None),
        ("PUT", None),
        ("GET", "bytes=1000-1999"),
    ]


def test_a_signed_request_is_accepted_and_an_upload_passes(
    s3: EmbeddedS3, new_bucket: Callable[[], str]
) -> None:
    bucket = new_bucket()
    with (
        FaultProxy(s3.endpoint_url) as proxy,
        contextlib.closing(signed_client(s3, proxy)) as client,
    ):
        client.put_object(Bucket=bucket, Key="folder/a key +%.bin", Body=MODEL)
        client.upload_file(__file__, bucket, "this.py")
        got = client.get_object(Bucket=bucket, Key="folder/a key +%.bin", Range="bytes=5-9")

        assert got["Body"].read() == MODEL[5:10]
        assert client.get_object(Bucket=bucket, Key="this.py")["Body"].read() == (
            Path(__file__).read_bytes()
        )


def signed_client(s3: EmbeddedS3, proxy: FaultProxy) -> Any:
    return boto3.session.Session().client(
        "s3",
        endpoint_url=proxy.endpoint_url,
        aws_access_key_id=s3.admin.access_key_id,
        aws_secret_access_key=s3.admin.secret_access_key,
        region_name="us-east-1",
        config=Config(s3={"addressing_style": "path"}, retries={"total_max_attempts": 1}),
    )


def test_a_chunked_answer_and_a_chunked_upload_pass(proxied: Proxied) -> None:
    received: list[bytes] = []

    with ChunkingServer(received) as upstream, FaultProxy(upstream.endpoint_url) as proxy:
        client = http.client.HTTPConnection("127.0.0.1", proxy.port, 30)
        with contextlib.closing(client):
            client.request("PUT", "/x", iter([b"one", b"two"]), encode_chunked=True)
            response = client.getresponse()
            assert (response.status, response.read()) == (200, MODEL)
    assert received == [b"onetwo"]


class ChunkingServer(LoopbackServer):
    """Answers one request with MODEL in chunks, and remembers the body it was sent."""

    def __init__(self, received: list[bytes]) -> None:
        self._received = received
        super().__init__("object-server-in-chunks")

    def serve(self, client: socket.socket) -> None:
        wire = Wire(client)
        request = wire.head()
        assert request is not None
        self._received.append(b"".join(wire.request_body(request)))
        client.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        for start in range(0, len(MODEL), 70_000):
            piece = MODEL[start : start + 70_000]
            client.sendall(b"%x\r\n%b\r\n" % (len(piece), piece))
        client.sendall(b"0\r\n\r\n")


def test_an_upstream_that_is_not_there_is_a_bad_gateway(
    server: ObjectServer, proxied: Proxied
) -> None:
    proxy = proxied()
    assert ask(proxy).status == 200
    server.close()

    assert ask(proxy).status == HTTPStatus.BAD_GATEWAY


def test_an_upstream_that_closes_idle_connections_is_not_noticed(proxied: Proxied) -> None:
    with OneAnswerServer("object-server-of-one") as upstream:
        proxy = FaultProxy(upstream.endpoint_url)
        client = http.client.HTTPConnection("127.0.0.1", proxy.port, 30)
        with proxy, contextlib.closing(client):
            assert ask_again(client).body == b"ok"
            upstream.closed.acquire()
            assert ask_again(client).body == b"ok"


class OneAnswerServer(LoopbackServer):
    """Promises to keep connections alive and closes them after one answer."""

    def __init__(self, name: str) -> None:
        self.closed = threading.Semaphore(0)
        super().__init__(name)

    def serve(self, client: socket.socket) -> None:
        client.recv(65536)
        client.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
        self.release(client)
        self.closed.release()


def test_closing_the_proxy_ends_its_idle_connections(proxied: Proxied) -> None:
    proxy = proxied()
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", proxy.port, 30)) as client:
        ask_again(client)
        proxy.close()
        with pytest.raises(OSError, match="refused"):
            socket.create_connection(("127.0.0.1", proxy.port), 30)
        with pytest.raises((OSError, http.client.HTTPException)):
            ask_again(client)


def test_an_upstream_that_is_not_plain_http_is_refused() -> None:
    with pytest.raises(ValueError, match="https://somewhere"):
        FaultProxy("https://somewhere")


# --- Faults on the wire.


def test_a_reset_is_a_real_one(proxied: Proxied) -> None:
    proxy = proxied(Fault(FaultKind.RESET, at=MIDDLE))

    with raw_request(proxy) as client, pytest.raises(ConnectionResetError):
        everything(client)


def test_a_reset_before_the_head_comes_when_the_upstream_has_answered(
    server: ObjectServer, proxied: Proxied
) -> None:
    proxy = proxied(Fault(FaultKind.RESET, at=BEFORE_HEAD))

    with raw_request(proxy) as client, pytest.raises(ConnectionResetError):
        client.recv(1)
    assert [request.status for request in server.requests()] == [200]


@pytest.mark.parametrize("at", [0, 1, 65536, MIDDLE])
def test_a_truncated_body_ends_in_good_order_after_so_many_bytes(proxied: Proxied, at: int) -> None:
    proxy = proxied(Fault(FaultKind.TRUNCATE, at=at))

    with raw_request(proxy) as client:
        head, _, body = everything(client).partition(b"\r\n\r\n")
    assert f"Content-Length: {len(MODEL)}".encode() in head
    assert body == MODEL[:at]


def test_a_position_beyond_the_body_is_its_last_byte(proxied: Proxied) -> None:
    proxy = proxied(Fault(FaultKind.TRUNCATE, at=10**9))

    with raw_request(proxy) as client:
        body = everything(client).partition(b"\r\n\r\n")[2]
    assert body == MODEL[:-1]


def test_a_stalled_body_goes_no_further_until_the_proxy_is_closed(proxied: Proxied) -> None:
    proxy = proxied(Fault(FaultKind.STALL, at=MIDDLE))

    with raw_request(proxy) as client:
        _, body = head_and_body(client, MIDDLE)
        proxy.close()
        assert body + everything(client) == MODEL[:MIDDLE]


def test_a_stall_with_an_end_is_followed_by_the_rest(proxied: Proxied) -> None:
    proxy = proxied(Fault(FaultKind.STALL, at=MIDDLE, seconds=0.01))

    assert ask(proxy).body == MODEL


def test_a_stalled_connection_is_given_up_with_its_client(
    server: ObjectServer, proxied: Proxied
) -> None:
    proxy = proxied(Fault(FaultKind.STALL, at=5))

    with raw_request(proxy) as client:
        head_and_body(client, 5)
        [thread] = [
            thread
            for thread in threading.enumerate()
            if thread.name.startswith("fault-proxy") and thread.name != "fault-proxy-accept"
        ]
    thread.join(20)
    assert not thread.is_alive()


def test_a_dripping_body_gives_one_byte_and_waits(proxied: Proxied) -> None:
    proxy = proxied(Fault(FaultKind.DRIP, at=100, seconds=600))

    with raw_request(proxy) as client:
        _, body = head_and_body(client, 101)
        proxy.close()
        assert body + everything(client) == MODEL[:101]


def test_a_dripping_body_arrives_in_the_end(proxied: Proxied) -> None:
    proxy = proxied(Fault(FaultKind.DRIP, at=len(MODEL) - 20, seconds=0.001))

    assert ask(proxy).body == MODEL


def test_garbage_is_not_http(proxied: Proxied) -> None:
    with pytest.raises(http.client.BadStatusLine):
        ask(proxied(Fault(FaultKind.GARBAGE)))


def test_half_a_head_ends_within_the_head(proxied: Proxied) -> None:
    with raw_request(proxied(Fault(FaultKind.HALF_HEADERS))) as client:
        received = everything(client)
    assert received.startswith(b"HTTP/1.1 200 OK\r\n")
    assert b"\r\n\r\n" not in received


def test_a_refused_connection_is_closed_without_a_word(
    server: ObjectServer, proxied: Proxied
) -> None:
    with raw_request(proxied(Fault(FaultKind.REFUSE))) as client:
        assert everything(client) == b""
    assert server.requests() == []


# --- Faults of the answer.


@pytest.mark.parametrize("at", [0, 65536, MIDDLE, len(MODEL) - 1])
def test_a_flipped_byte_is_the_only_difference(proxied: Proxied, at: int) -> None:
    answer = ask(proxied(Fault(FaultKind.FLIP, at=at)))

    expected = bytearray(MODEL)
    expected[at] ^= 0xFF
    assert answer.body == expected
    assert answer.headers["ETag"] == ETAG


def test_a_flipped_byte_is_counted_from_the_ranges_beginning(proxied: Proxied) -> None:
    answer = ask(proxied(Fault(FaultKind.FLIP, at=3)), headers=RANGE)

    assert answer.body[:3] == MODEL[1000:1003]
    assert answer.body[3] == MODEL[1003] ^ 0xFF


def test_a_stale_answer_is_another_version_of_the_same_length(proxied: Proxied) -> None:
    proxy = proxied(Fault(FaultKind.STALE))
    whole, part, head = ask(proxy), ask(proxy, headers=RANGE), ask(proxy, method="HEAD")

    assert whole.body != MODEL
    assert len(whole.body) == len(MODEL)
    assert part.body == whole.body[1000:2000]
    assert whole.headers["ETag"] == part.headers["ETag"] == head.headers["ETag"] != ETAG


@pytest.mark.parametrize("by", [-70_000, -1, 1])
def test_a_wrong_length_is_said_and_sent(proxied: Proxied, by: int) -> None:
    proxy = proxied(Fault(FaultKind.WRONG_LENGTH, by=by))
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", proxy.port, 30)) as client:
        answers = [ask_again(client), ask_again(client)]

    for answer in answers:
        assert answer.headers["Content-Length"] == str(len(answer.body)) == str(len(MODEL) + by)
        assert answer.body[: len(MODEL)] == MODEL[: len(MODEL) + min(by, 0)]


def test_a_wrong_range_is_not_the_one_that_was_asked_for(proxied: Proxied) -> None:
    answer = ask(proxied(Fault(FaultKind.WRONG_RANGE, by=8)), headers=RANGE)

    assert answer.headers["Content-Range"] == f"bytes 1008-2007/{len(MODEL)}"
    assert (answer.status, answer.body) == (206, MODEL[1000:2000])


def test_an_etag_can_be_left_out(proxied: Proxied) -> None:
    answer = ask(proxied(Fault(FaultKind.NO_ETAG)))

    assert "ETag" not in answer.headers
    assert answer.body == MODEL


def test_a_range_can_be_answered_with_the_whole_object(proxied: Proxied) -> None:
    answer = ask(proxied(Fault(FaultKind.WHOLE_BODY)), headers=RANGE)

    assert (answer.status, answer.body) == (200, MODEL)
    assert "Content-Range" not in answer.headers


def test_a_range_can_be_answered_with_status_200(proxied: Proxied) -> None:
    answer = ask(proxied(Fault(FaultKind.RANGE_AS_200)), headers=RANGE)

    assert (answer.status, answer.body) == (200, MODEL[1000:2000])
    assert answer.headers["Content-Range"] == f"bytes 1000-1999/{len(MODEL)}"


@pytest.mark.parametrize(
    ("fault", "status", "code", "retry_after"),
    [
        (Fault(FaultKind.STATUS), 503, "ServiceUnavailable", None),
        (Fault(FaultKind.STATUS, status=500), 500, "InternalError", None),
        (Fault(FaultKind.STATUS, status=429, retry_after="2"), 429, "TooManyRequests", "2"),
        (Fault(FaultKind.SLOW_DOWN, retry_after="1"), 503, "SlowDown", "1"),
        (Fault(FaultKind.EXPIRED), 403, "ExpiredToken", None),
        (Fault(FaultKind.EXPIRED, status=400), 400, "ExpiredToken", None),
        (Fault(FaultKind.SKEWED), 403, "RequestTimeTooSkewed", None),
    ],
)
def test_an_error_is_s3s_and_the_upstream_hears_nothing(
    server: ObjectServer,
    proxied: Proxied,
    fault: Fault,
    status: int,
    code: str,
    retry_after: str | None,
) -> None:
    proxy = proxied(fault)
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", proxy.port, 30)) as client:
        got = ask_again(client)
        head = ask_again(client, method="HEAD")
        put = ask_again(client, method="PUT", body=MODEL)

    assert {got.status, head.status, put.status} == {status}
    assert f"<Code>{code}</Code>".encode() in got.body
    assert got.headers["Retry-After"] == retry_after
    assert head.body == b""
    assert server.requests() == []


def test_a_skewed_server_says_what_time_it_has(proxied: Proxied) -> None:
    ahead = ask(proxied(Fault(FaultKind.SKEWED, seconds=86400)))
    behind = ask(proxied(Fault(FaultKind.SKEWED, seconds=-86400)))

    between = parsedate_to_datetime(ahead.headers["Date"]) - parsedate_to_datetime(
        behind.headers["Date"]
    )
    assert between.days == 2
    assert b"<ServerTime>" in ahead.body


def test_an_error_keeps_its_own_words_when_the_object_would_be_stale(
    server: ObjectServer, proxied: Proxied
) -> None:
    answer = ask(proxied(Fault(FaultKind.STALE)), "/models/none")

    assert answer.body == ask(server, "/models/none").body


@pytest.mark.parametrize("kind", [FaultKind.RESET, FaultKind.TRUNCATE])
def test_an_answer_without_a_body_is_struck_before_its_head(
    proxied: Proxied, kind: FaultKind
) -> None:
    with pytest.raises(ConnectionError):  # RemoteDisconnected is one
        ask(proxied(Fault(kind, at=5)), method="HEAD")
