"""What strangers do to a door on the internet, done to the real gateway before the real Cog server."""

from __future__ import annotations

import contextlib
import http.client
import http.server
import itertools
import json
import re
import socket
import threading
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from pathlib import Path
from typing import Any

import httpx
import pytest

from demo.s3 import EmbeddedS3
from gateway.keys import digest_of, new_key
from tests.support.gateway_server import TIMEOUT_S, GatewayServer, small_runner

# One for each test that spends, as what one may spend is limited.
KEYS = {name: new_key() for name in ("ann", "bob", "rates", "webhooks", "words")}
BURST = 40
MOST_BODY_BYTES = 1024 * 1024
HUNDRED_MB = 100 * 1000 * 1000
APP = "https://app.example.com"
# The one address that webhooks may reach; all others of this machine are as forbidden as anywhere.
ALLOWED = "127.0.0.2"
SECURITY_HEADERS = (
    "x-content-type-options",
    "referrer-policy",
    "x-frame-options",
    "cross-origin-opener-policy",
)


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_runner(tmp_path_factory.mktemp("runner"))


@pytest.fixture(scope="module")
def environment(s3: EmbeddedS3) -> dict[str, str]:
    bucket = f"images-{uuid.uuid4().hex[:8]}"
    s3.create_bucket(bucket)
    return {
        **s3.environment(),
        "PUBLIC_BUCKET_NAME": bucket,
        "COG_MAX_CONCURRENCY": "1",
        "QUEUE_SIZE": "1",
        "API_KEYS": ",".join(f"{name}:{digest_of(key)}" for name, key in KEYS.items()),
        "RATE_LIMIT_PER_MINUTE": "1",
        "RATE_LIMIT_BURST": str(BURST),
        "MAX_BODY_BYTES": str(MOST_BODY_BYTES),
        "BODY_TIMEOUT_SECONDS": "1",
        "ALLOW_PRIVATE_HOSTS": ALLOWED,
        "CORS_ORIGINS": APP,
    }


@pytest.fixture(scope="module")
def door(environment: dict[str, str], runner: Path) -> Iterator[GatewayServer]:
    """Whatever was done to it, it goes on, says nothing of its keys, and was never at a loss."""
    with GatewayServer(environment, runner) as gateway:
        yield gateway
        made = gateway.put("the-last", {"prompt": "still there"}, headers=key("ann"))
        assert made.json()["status"] == "succeeded", made.text
    assert gateway.process.returncode == 0
    assert "Traceback" not in gateway.logs
    assert "unexpected error" not in gateway.logs
    for secret in KEYS.values():
        assert secret not in gateway.logs
        assert digest_of(secret) not in gateway.logs


@pytest.fixture
def callers() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as pool:
        yield pool


def key(name: str, scheme: str = "Bearer") -> dict[str, str]:
    return {"Authorization": f"{scheme} {KEYS[name]}"}


def predict(gateway: GatewayServer, name: str, **fields: Any) -> httpx.Response:
    body = {"input": {"prompt": "x"}, **fields}
    return gateway.post("/predictions", json=body, headers=key(name))


@contextlib.contextmanager
def connected(gateway: GatewayServer, head: bytes = b"") -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", gateway.port), TIMEOUT_S) as connection:
        connection.sendall(head)
        yield connection


def answer_on(connection: socket.socket) -> tuple[http.client.HTTPResponse, Any]:
    response = http.client.HTTPResponse(connection)
    response.begin()
    return response, json.loads(response.read() or b"null")


def test_only_who_has_a_key_comes_in(door: GatewayServer) -> None:
    wrong = new_key()
    for method, path in (
        ("POST", "/predictions"),
        ("PUT", "/predictions/x"),
        ("GET", "/predictions"),
        ("GET", "/predictions/x"),
        ("POST", "/predictions/x/cancel"),
        ("GET", "/metrics"),
    ):
        body = {"input": {"prompt": "x"}} if method != "GET" else None
        for header in (
            {},
            {"Authorization": f"Bearer {wrong}"},
            {"Authorization": f"Basic {KEYS['ann']}"},
            {"Authorization": KEYS["ann"]},
            {"Authorization": f"Bearer {digest_of(KEYS['ann'])}"},
            {"Authorization": "Bearer " + "\xe9" * 10},
        ):
            answer = httpx.request(
                method,
                door.url + path,
                json=body,
                headers={name: value.encode("latin-1") for name, value in header.items()},
                trust_env=False,
            )
            assert answer.status_code == HTTPStatus.UNAUTHORIZED, (method, path, header)
            assert answer.headers["WWW-Authenticate"] == "Bearer"
            assert "key" in answer.json()["detail"]
            assert wrong not in answer.text
            assert KEYS["ann"] not in answer.text
    for scheme in ("Bearer", "bearer", "Token"):
        assert door.get("/predictions", headers=key("ann", scheme)).is_success
    assert wrong not in door.logs


def test_what_needs_no_key_tells_nothing_of_the_model(door: GatewayServer) -> None:
    for path in ("/live", "/ready", "/health-check", "/status", "/openapi.json"):
        assert door.get(path).status_code == HTTPStatus.OK
    assert "test/runner" not in door.get("/status").text
    assert door.get("/status").json()["needs_key"] is True
    assert door.get("/status", headers=key("ann")).json()["model"] == {"path": "test/runner"}
    assert "setting up" not in door.get("/health-check").text
    assert "reason" not in door.get("/status", headers={"Authorization": "Bearer no"}).json()


def test_what_one_key_asks_too_often_is_refused_and_another_is_not(door: GatewayServer) -> None:
    answers = [predict(door, "rates") for _ in range(BURST + 2)]
    assert [answer.status_code for answer in answers] == [200] * BURST + [429] * 2
    for refused in answers[BURST:]:
        assert 1 <= int(refused.headers["Retry-After"]) <= 60
        assert "RATE_LIMIT_PER_MINUTE" in refused.json()["detail"]
    # Looking costs nothing, and others have their own.
    assert door.get("/predictions", headers=key("rates")).is_success
    assert predict(door, "bob").is_success


@pytest.mark.parametrize("declared", [True, False])
def test_a_body_of_100_mb_is_refused_and_not_kept(door: GatewayServer, declared: bool) -> None:
    block = bytes(1000 * 1000)
    before = memory_of(door)
    answer = httpx.put(
        f"{door.url}/predictions/large",
        content=itertools.repeat(block, HUNDRED_MB // len(block)),
        headers={
            **key("words"),
            "Content-Type": "application/json",
            "Origin": APP,
            **({"Content-Length": str(HUNDRED_MB)} if declared else {}),
        },
        timeout=TIMEOUT_S,
        trust_env=False,
    )
    assert answer.status_code == HTTPStatus.REQUEST_ENTITY_TOO_LARGE
    assert str(MOST_BODY_BYTES) in answer.json()["detail"]
    assert_secure(answer.headers)
    assert answer.headers["Access-Control-Allow-Origin"] == APP
    assert memory_of(door) - before < 20 * MOST_BODY_BYTES


def memory_of(gateway: GatewayServer) -> int:
    """The most that the gateway's process has had in memory so far, in bytes."""
    status = Path(f"/proc/{gateway.process.pid}/status").read_text()
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    assert found is not None
    return int(found[1]) * 1024


def test_a_body_that_drips_is_not_waited_for(door: GatewayServer) -> None:
    head = (
        f"PUT /predictions/drip HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEYS['words']}\r\n"
        "Content-Type: application/json\r\nContent-Length: 1000\r\n\r\n"
    )
    with connected(door, head.encode()) as connection:
        connection.settimeout(0.05)
        for byte in itertools.repeat(b"{"):
            connection.sendall(byte)
            with contextlib.suppress(TimeoutError):
                if connection.recv(1, socket.MSG_PEEK):
                    break
        connection.settimeout(TIMEOUT_S)
        response, body = answer_on(connection)
    assert response.status == HTTPStatus.REQUEST_TIMEOUT
    assert "1 seconds" in body["detail"]
    assert_secure(response.headers)


def test_a_caller_who_hangs_up_in_the_middle_of_a_body_is_no_fault_of_the_server(
    door: GatewayServer,
) -> None:
    def aborted() -> str:
        found = re.search(
            r'route="/predictions",status="400"\} (\S+)',
            door.get("/metrics", headers=key("ann")).text,
        )
        return found[1] if found else "0"

    before = aborted()
    head = (
        f"POST /predictions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEYS['words']}\r\n"
        "Content-Type: application/json\r\nContent-Length: 1000\r\n\r\n{"
    )
    with connected(door, head.encode()):
        pass
    door.until(lambda: aborted() != before)
    assert "unexpected error" not in door.logs


def test_webhooks_lead_nowhere_inside(door: GatewayServer) -> None:
    with listener("127.0.0.1") as inside:
        for url in (
            "http://169.254.169.254/latest/meta-data/",
            "http://2852039166/latest/meta-data/",
            "http://0xa9fea9fe/",
            "http://0251.0376.0251.0376/",
            "http://169.254.43518/",
            "http://[::ffff:169.254.169.254]/",
            "http://[::ffff:a9fe:a9fe]/",
            "http://[64:ff9b::a9fe:a9fe]/",
            "http://[2002:a9fe:a9fe::]/",
            "http://[fd00:ec2::254]/",
            "http://[fe80::1]/",
            "http://[::1]/",
            "http://[::]/",
            "http://0.0.0.0/",
            "http://10.0.0.1/",
            "http://100.100.100.200/",
            f"http://127.0.0.1:{inside.port}/",
            f"http://localhost:{inside.port}/",
            f"http://LocalHost:{inside.port}/",
            f"http://127.1:{inside.port}/",
            "http://someone:secret-of-theirs@example.com/",
            "file:///etc/passwd",
            "ftp://example.com/",
            "gopher://example.com/",
            "http:///nowhere",
            "//example.com/",
            "not a url",
            "",
        ):
            answer = predict(door, "webhooks", webhook=url)
            assert answer.status_code == HTTPStatus.UNPROCESSABLE_ENTITY, (url, answer.text)
            (told,) = answer.json()["detail"]
            assert told["loc"] == ["body", "webhook"]
            assert "secret-of-theirs" not in answer.text
        assert inside.seen == []


def test_a_webhook_s_redirect_is_not_followed(door: GatewayServer) -> None:
    with listener("127.0.0.1") as inside, listener(ALLOWED) as receiver:
        receiver.location = f"http://127.0.0.1:{inside.port}/secrets"
        made = predict(
            door,
            "words",
            webhook=f"http://{ALLOWED}:{receiver.port}/hook",
            webhook_events_filter=["completed"],
        )
        assert made.json()["status"] == "succeeded"
        door.until(lambda: "redirects are not followed" in door.logs)
        assert receiver.seen == ["POST /hook"]
        assert inside.seen == []


class Listener(http.server.ThreadingHTTPServer):
    """Notes who comes, and sends them on where `location` says."""

    daemon_threads = True
    location = ""

    def __init__(self, host: str) -> None:
        super().__init__((host, 0), Noting)
        self.seen: list[str] = []

    @property
    def port(self) -> int:
        return self.server_address[1]


class Noting(http.server.BaseHTTPRequestHandler):
    server: Listener

    def do_POST(self) -> None:
        self.server.seen.append(f"POST {self.path}")
        self.send_response(HTTPStatus.TEMPORARY_REDIRECT)
        self.send_header("Location", self.server.location)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_POST  # noqa: N815 - http.server's name

    def log_message(self, format: str, *arguments: Any) -> None:
        pass


@contextlib.contextmanager
def listener(host: str) -> Iterator[Listener]:
    with Listener(host) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_a_full_queue_says_when_to_come_back(
    door: GatewayServer, callers: ThreadPoolExecutor
) -> None:
    made = door.put("queue-made", {"prompt": "early"}, headers=key("ann")).json()
    held = [
        callers.submit(door.put, name, {"prompt": "long", "seconds": 60}, headers=key("ann"))
        for name in ("queue-runs", "queue-waits")
    ]
    door.until(
        lambda: (
            door.get("/status").json()["queue"]
            == {"waiting": 1, "running": 1, "slots": 1, "size": 1}
        )
    )
    refused = predict(door, "words")
    again = door.put("queue-made", {"prompt": "early"}, headers=key("ann"))
    assert door.get("/ready").is_success  # it is busy, not ill: no platform should replace it
    for name in ("queue-waits", "queue-runs"):
        assert door.post(f"/predictions/{name}/cancel", headers=key("ann")).is_success
    assert [asked.result(TIMEOUT_S).json()["status"] for asked in held] == ["canceled"] * 2
    assert refused.status_code == HTTPStatus.TOO_MANY_REQUESTS
    assert int(refused.headers["Retry-After"]) > 0
    assert "waiting already" in refused.json()["detail"]
    # What is recorded needs no place.
    assert (again.status_code, again.json()["completed_at"]) == (200, made["completed_at"])


def test_every_answer_carries_the_security_headers(door: GatewayServer) -> None:
    answers = {
        HTTPStatus.OK: door.get("/live"),
        HTTPStatus.UNAUTHORIZED: door.get("/predictions"),
        HTTPStatus.NOT_FOUND: door.get("/nothing/here"),
        HTTPStatus.METHOD_NOT_ALLOWED: door.post("/live"),
        HTTPStatus.UNPROCESSABLE_ENTITY: door.put("x", {"prompt": 7}, headers=key("words")),
        HTTPStatus.UNSUPPORTED_MEDIA_TYPE: door.post(
            "/predictions", content=b"x", headers=key("words")
        ),
        HTTPStatus.REQUEST_ENTITY_TOO_LARGE: door.post(
            "/predictions", content=bytes(MOST_BODY_BYTES + 1), headers=key("words")
        ),
    }
    for status, answer in answers.items():
        assert answer.status_code == status, answer.text
        assert_secure(answer.headers)
        assert "server" not in answer.headers


def assert_secure(headers: Any) -> None:
    for name in SECURITY_HEADERS:
        assert headers[name], name
    assert headers["x-content-type-options"] == "nosniff"


def test_what_is_no_http_is_told_so(door: GatewayServer) -> None:
    answers = 0
    filler = b"".join(b"X-%d: %s\r\n" % (number, b"a" * 1000) for number in range(1000))
    for head in (
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # TLS
        b"GET /live HTTP/9.9\r\nHost: x\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\nHost: x\r\n\r\n",
        b"CONNECT example.com:443 HTTP/1.1\r\nHost: x\r\n\r\n",
        b"POST /live HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"GET /live HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
        b"GET /live HTTP/1.1\r\nHost: x\r\n bad\x00header: y\r\n\r\n",
        b"GET /" + b"a" * 300_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /live HTTP/1.1\r\nHost: x\r\n" + filler,
        b"GET /live HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip\r\n\r\n",
    ):
        # It may have been told, and the connection closed, before all of it was sent.
        with connected(door) as connection, contextlib.suppress(ConnectionError):
            connection.sendall(head)
            response, body = answer_on(connection)
            answers += 1
            assert response.status in (
                HTTPStatus.BAD_REQUEST,
                HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE,
            ), head[:60]
            assert body["detail"]
            assert_secure(response.headers)
            assert connection.recv(1) == b""
    assert answers >= 8


def test_a_websocket_is_not_spoken(door: GatewayServer) -> None:
    head = (
        b"GET /live HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
        b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    )
    with connected(door, head) as connection:
        response, body = answer_on(connection)
    assert (response.status, body) == (200, {"status": "live"})


def test_many_who_connect_and_say_nothing_keep_nobody_out(door: GatewayServer) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(200):
            stack.enter_context(connected(door, b"GET /live HTTP/1.1\r\nX-Slow: "))
        assert door.get("/live").is_success
        assert door.get("/ready").is_success


def test_whatever_can_be_got_can_be_asked_for_its_head(door: GatewayServer) -> None:
    for path in ("/live", "/ready", "/health-check", "/status", "/openapi.json", "/predictions"):
        got = door.get(path, headers=key("ann"))
        head = httpx.head(door.url + path, headers=key("ann"), trust_env=False)
        assert head.status_code == got.status_code == HTTPStatus.OK
        assert head.headers["Content-Type"] == got.headers["Content-Type"]
        assert head.content == b""
    assert httpx.head(door.url + "/predictions", trust_env=False).status_code == 401
    assert httpx.head(door.url + "/predictions/none", headers=key("ann")).status_code == 404


def test_what_json_can_spell_and_others_cannot_is_no_fault_of_the_server(
    door: GatewayServer,
) -> None:
    for body in (
        b"",
        b"null",
        b"[]",
        b"7",
        b"{",
        b'{"input": null}',
        b'{"input": []}',
        b'{"input": {"prompt": "x", "seconds": NaN}}',
        b'{"input": {"prompt": "x", "seconds": Infinity}}',
        b'{"input": {"prompt": "x", "seconds": 1e999}}',
        b'{"input": {"prompt": "x", "seed": ' + b"9" * 6000 + b"}}",
        b'{"input": {"prompt": "\\ud800"}}',
        b'{"id": "\\ud800", "input": {"prompt": "x"}}',
        b'{"id": "a/../b", "input": {"prompt": "x"}, "context": 7}',
        b'{"id": 7, "input": {"prompt": "x"}}',
        b'{"id": "' + b"a" * 600 + b'", "input": {"prompt": "x"}}',
        b'{"input": {"prompt": "x"}, "webhook": 7}',
        b'{"input": {"prompt": "x"}, "webhook": "http://\\ud800/"}',
        b'{"input": {"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}}",
        b"\xff\xfe{}",
    ):
        answer = door.post(
            "/predictions",
            content=body,
            headers={**key("words"), "Content-Type": "application/json"},
        )
        assert 400 <= answer.status_code < 500, (body[:80], answer.status_code, answer.text[:300])
        assert answer.json()["detail"]
    # What the model does not have is dropped, whatever it is; and no schema bounds the seed.
    odd = b'{"input": {"prompt": "x", "\\ud800": 0, "seed": 123456789012345678901234567890}}'
    json_headers = {**key("words"), "Content-Type": "application/json"}
    assert door.post("/predictions", content=odd, headers=json_headers).is_success


def test_only_the_pages_that_were_named_may_call_from_a_browser(door: GatewayServer) -> None:
    asks = {
        "Origin": APP,
        "Access-Control-Request-Method": "PUT",
        "Access-Control-Request-Headers": "authorization, content-type, prefer",
    }
    preflight = httpx.options(door.url + "/predictions/x", headers=asks, trust_env=False)
    assert preflight.is_success
    assert preflight.headers["Access-Control-Allow-Origin"] == APP
    assert_secure(preflight.headers)
    stranger = httpx.options(
        door.url + "/predictions/x", headers={**asks, "Origin": "https://evil.example"}
    )
    assert "Access-Control-Allow-Origin" not in stranger.headers
    refused = door.get("/predictions", headers={"Origin": APP})
    assert refused.status_code == HTTPStatus.UNAUTHORIZED
    assert refused.headers["Access-Control-Allow-Origin"] == APP
    assert "Retry-After" in refused.headers["Access-Control-Expose-Headers"]
    assert (
        "Access-Control-Allow-Origin" not in door.get("/live", headers={"Origin": "null"}).headers
    )
