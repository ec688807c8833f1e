"""The proxy does to a plain client what it says it does, and nothing when told nothing."""

from __future__ import annotations

import contextlib
import http.client
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.config import Config

from demo.s3 import EmbeddedS3
from tests.support.fault_proxy import Decision, FaultProxy, ProxyRequest, scripted, seeded
from tests.support.faults import BEFORE_HEAD, Fault, FaultKind
from tests.support.object_server import LoopbackServer, ObjectServer, Wire
from tests.support.plain_client import (
    CONFIG_PATH,
    ETAG,
    MIDDLE,
    MODEL,
    MODEL_PATH,
    RANGE,
    ask,
    ask_again,
    leaves_no_thread_or_socket,
    write_bucket,
)


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


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bucket(tmp_path_factory.mktemp("buckets"))


@pytest.fixture
def server(folder: Path) -> Iterator[ObjectServer]:
    with ObjectServer(folder) as server:
        yield server


Proxied = Callable[..., FaultProxy]


@pytest.fixture
def proxied(server: ObjectServer) -> Iterator[Proxied]:
    """Makes a proxy before the server that strikes every request with one fault, or as a decision wants."""
    with contextlib.ExitStack() as proxies:

        def make(what: Fault | Decision | None = None) -> FaultProxy:
            decide = what if callable(what) else lambda _: what
            return proxies.enter_context(FaultProxy(server.endpoint_url, decide))

        yield make


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    with leaves_no_thread_or_socket():
        yield


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


# --- Deciding.


def test_a_script_is_followed_in_its_order(proxied: Proxied) -> None:
    busy, slow = Fault(FaultKind.STATUS), Fault(FaultKind.SLOW_DOWN)
    expired = Fault(FaultKind.EXPIRED)
    rules = [("*.json", busy, 2, 1), ("*.json", slow, 1, 0), ("HEAD /models/*", expired, None, 0)]
    proxy = proxied(scripted(rules))

    answers = [ask(proxy, CONFIG_PATH).status for _ in range(5)]
    assert ask(proxy).status == 200
    assert [ask(proxy, method="HEAD").status for _ in range(2)] == [403, 403]
    assert answers == [200, 503, 503, 503, 200]
    assert [record.fault for record in proxy.requests] == [
        *(None, busy, busy, slow, None, None),
        *(expired, expired),
    ]


def test_a_decision_sees_the_request_and_its_numbers(proxied: Proxied) -> None:
    seen: list[ProxyRequest] = []
    proxy = proxied(seen.append)
    ask(proxy, headers=RANGE)
    ask(proxy, f"{CONFIG_PATH}?versionId=3")
    ask(proxy, headers={"range": "bytes=-7"})

    assert [(request.number, request.number_of_path) for request in seen] == [
        (1, 1),
        (2, 1),
        (3, 2),
    ]
    assert [(request.range, request.range_length) for request in seen] == [
        ("bytes=1000-1999", 1000),
        (None, None),
        ("bytes=-7", 7),
    ]
    assert (seen[1].path, seen[1].query) == (CONFIG_PATH, "versionId=3")
    assert seen[0].headers["host"] == f"127.0.0.1:{proxy.port}"


def request_of(part: int, bucket: str = "models") -> ProxyRequest:
    headers = {"range": f"bytes={part * 1000}-{part * 1000 + 999}"}
    return ProxyRequest("GET", f"/{bucket}/unet", "", headers, 0, 0)


def test_seeded_faults_do_not_depend_on_the_order_of_requests() -> None:
    def faults(seed: int, parts: list[int], bucket: str) -> dict[int, Fault | None]:
        decide = seeded(seed, 0.3, list(FaultKind))
        return {part: decide(request_of(part, bucket)) for part in parts}

    parts = list(range(400))
    expected = faults(1, parts, "models")
    struck = [fault for fault in expected.values() if fault]
    assert faults(1, parts[::-1], "other-bucket") == expected
    assert faults(2, parts, "models") != expected
    assert 60 < len(struck) < 180
    assert all(0 <= fault.at < 1000 for fault in struck)
    assert len({fault.kind for fault in struck}) > 10


def test_seeded_faults_can_be_bounded_so_that_asking_again_helps() -> None:
    decide = seeded(1, 1.0, [FaultKind.FLIP], at_most=2, pattern="GET *")

    with ThreadPoolExecutor(8) as threads:
        faults = list(threads.map(decide, [request_of(3)] * 50))
    assert sum(fault is not None for fault in faults) == 2
    assert decide(ProxyRequest("PUT", "/models/unet", "", {}, 1, 1)) is None


def test_a_mix_of_faults_leaves_every_other_answer_whole(
    server: ObjectServer, proxied: Proxied
) -> None:
    kinds = [FaultKind.FLIP, FaultKind.STATUS, FaultKind.RESET, FaultKind.TRUNCATE, FaultKind.STALE]
    proxy = proxied(seeded(5, 0.4, kinds))

    def read(part: int) -> bool:
        headers = {"Range": f"bytes={part * 1000}-{part * 1000 + 999}"}
        try:
            answer = ask(proxy, headers=headers)
        except (OSError, http.client.HTTPException):
            return False
        return answer.body == MODEL[part * 1000 : part * 1000 + 1000]

    with ThreadPoolExecutor(8) as threads:
        whole = list(threads.map(read, range(200)))
    assert sum(whole) == sum(record.fault is None for record in proxy.requests)
    assert 0 < sum(whole) < 200


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
