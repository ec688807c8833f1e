"""A real HTTP/1.1 proxy on loopback that stands before an S3 server and commits faults on command.

A client uses its `endpoint_url` as the endpoint. Requests go on as they came, Host included, so signatures hold; bodies
stream through 64 KiB at a time. Which request is struck by what is decided by a function; `scripted` and `seeded` make
two of them. Connections and threads are object_server.py's.
"""

from __future__ import annotations

import math
import random
import re
import select
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from urllib.parse import urlsplit

from tests.support.faults import (
    BEFORE_HEAD,
    Fault,
    FaultKind,
    damaged_body,
    damaged_head,
    invented_answer,
    split_at,
    within,
)
from tests.support.object_server import Head, LoopbackServer, Wire, s3_error

DRIP_SECONDS = 0.01
CONNECT_SECONDS = 10.0

_REQUESTED_RANGE = re.compile(r"bytes=(\d*)-(\d*)")


@dataclass(frozen=True)
class ProxyRequest:
    """What there is to decide by. `number` counts the proxy's requests and `number_of_path` this path's, from 1."""

    method: str
    path: str
    """As it was sent, percent-encoded, without the query."""
    query: str
    headers: Mapping[str, str]
    """By lower-case name."""
    number: int
    number_of_path: int

    @property
    def range(self) -> str | None:
        return self.headers.get("range")

    @property
    def range_length(self) -> int | None:
        """How many bytes are asked for; None where that depends on the object's size."""
        match = _REQUESTED_RANGE.fullmatch(self.range or "")
        if match is None or not match[2]:
            return None
        return int(match[2]) - int(match[1]) + 1 if match[1] else int(match[2])


@dataclass(frozen=True)
class RequestRecord:
    """One request, in the order of arrival, and the fault that was decided for it."""

    method: str
    path: str
    range: str | None
    fault: Fault | None


Decision = Callable[[ProxyRequest], Fault | None]
Rule = tuple[str, Fault, int | None, int]


def scripted(rules: Sequence[Rule]) -> Decision:
    """Faults in the order of a list of (pattern, fault, times, skip); safe for threads.

    The pattern is the shell's, for the path, or for method and path ("GET /bucket/*.safetensors"). The first rule that
    matches and is not used up decides: it lets `skip` requests pass, then strikes `times` (None: for ever).
    """
    lock = threading.Lock()
    seen = Counter[int]()

    def decide(request: ProxyRequest) -> Fault | None:
        with lock:
            for index, (pattern, fault, times, skip) in enumerate(rules):
                used_up = times is not None and seen[index] >= skip + times
                if used_up or not _matches(pattern, request):
                    continue
                seen[index] += 1
                return fault if seen[index] > skip else None
        return None

    return decide


def seeded(
    seed: int,
    rate: float,
    kinds: Sequence[FaultKind],
    *,
    pattern: str = "*",
    seconds: float | None = None,
    at_most: int | None = None,
) -> Decision:
    """Strikes a share `rate` of the requests that match, with kinds and positions drawn by chance; safe for threads.

    What is drawn depends on the seed, the object's key and the range, and how often just these were asked for before:
    the same requests meet the same faults whatever order threads bring them in, and in a bucket of another name.
    `at_most` bounds the faults for one range of one key, so that a client that asks again gets through.
    """
    lock = threading.Lock()
    asked = Counter[str]()
    struck = Counter[str]()

    def decide(request: ProxyRequest) -> Fault | None:
        if not _matches(pattern, request):
            return None
        what = f"{request.method} {request.path.lstrip('/').partition('/')[2]} {request.range}"
        with lock:
            asked[what] += 1
            chance = random.Random(f"{seed} {what} {asked[what]}")
            if chance.random() >= rate or (at_most is not None and struck[what] >= at_most):
                return None
            struck[what] += 1
        return Fault(
            kind := chance.choice(list(kinds)),
            at=chance.randrange(max(1, request.range_length or 64 * 1024)),
            seconds=seconds,
            by=chance.choice((-1, 1)),
            status=chance.choice((429, 500, 503)) if kind is FaultKind.STATUS else None,
        )

    return decide


def _matches(pattern: str, request: ProxyRequest) -> bool:
    value = f"{request.method} {request.path}" if " " in pattern else request.path
    return fnmatchcase(value, pattern)


class FaultProxy(LoopbackServer):
    """`with FaultProxy(server.endpoint_url, decide) as proxy:` stands before the server until the block ends.

    `decide` is called by the connections' threads, once for each request.
    """

    def __init__(self, upstream_url: str, decide: Decision = lambda _: None) -> None:
        url = urlsplit(upstream_url)
        if url.scheme != "http" or url.hostname is None or url.path not in {"", "/"}:
            raise ValueError(f"the upstream is to be http://host:port, not {upstream_url!r}")
        self.upstream = (url.hostname, url.port or 80)
        self._decide = decide
        self._records: list[RequestRecord] = []
        self._paths = Counter[str]()
        super().__init__("fault-proxy")

    @property
    def requests(self) -> list[RequestRecord]:
        with self._lock:
            return self._records.copy()

    def serve(self, client: socket.socket) -> None:
        conversation = _Conversation(self, client)
        try:
            while conversation.turn():
                pass
        except _HangUpError as end:
            self.release(client, reset=end.reset)
        finally:
            conversation.drop_upstream()

    def decided(self, head: Head) -> Fault | None:
        """Number the request, have its fault decided and write both down, before anything is answered."""
        method, target, _ = head.start.split(" ", 2)
        path, _, query = target.partition("?")
        headers = {name.lower(): value for name, value in head.fields}
        with self._lock:
            self._paths[path] += 1
            place = len(self._records)
            self._records.append(RequestRecord(method, path, headers.get("range"), None))
            request = ProxyRequest(method, path, query, headers, place + 1, self._paths[path])
        fault = self._decide(request)
        with self._lock:
            self._records[place] = replace(self._records[place], fault=fault)
        return fault


class _HangUpError(Exception):
    """The connection to the client ends here: with a FIN, or with a RST."""

    def __init__(self, *, reset: bool = False) -> None:
        super().__init__()
        self.reset = reset


class _Conversation:
    """One client's connection, and the one to the upstream that belongs to it."""

    def __init__(self, proxy: FaultProxy, client: socket.socket) -> None:
        self._proxy = proxy
        self._client = Wire(client)
        self._upstream: Wire | None = None

    def turn(self) -> bool:
        """Read one request and answer it; False when the connection is to be closed."""
        request = self._client.head()
        if request is None:
            return False
        fault = self._proxy.decided(request)
        if fault is not None and fault.kind is FaultKind.REFUSE:
            raise _HangUpError
        if (request.get("expect") or "").lower() == "100-continue":
            self._client.sock.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
            request = request.without("expect")
        invented = invented_answer(fault, with_body=not request.start.startswith("HEAD "))
        if fault is None or invented is None:
            return self._pass_on(request, fault)
        for _ in self._client.request_body(request):
            pass
        self._client.sock.sendall(invented)
        return request.keeps_alive and fault.kind is not FaultKind.GARBAGE

    def drop_upstream(self) -> None:
        if self._upstream is not None:
            self._proxy.release(self._upstream.sock)
            self._upstream = None

    def _pass_on(self, request: Head, fault: Fault | None) -> bool:
        if fault is not None and fault.kind is FaultKind.WHOLE_BODY:
            request = request.without("range")
        try:
            upstream, answer = self._ask(request)
        except OSError as error:
            host, port = self._proxy.upstream
            message = f"no answer from {host}:{port}: {error}"
            self._client.sock.sendall(s3_error(502, "BadGateway", message))
            return False
        pieces, length = _body(upstream, request, answer)
        if fault is None:
            self._client.sock.sendall(answer.encode())
            _send(self._client.sock, pieces, chunked=answer.chunked)
        else:
            self._answer_wrongly(fault, answer, pieces, length)
        if length is None and not answer.chunked:  # its end is the connection's
            return False
        return request.keeps_alive and answer.keeps_alive

    def _ask(self, request: Head) -> tuple[Wire, Head]:
        if self._upstream is not None and not self._upstream.idle():
            self.drop_upstream()  # kept alive until the upstream had enough of it
        if self._upstream is None:
            sock = socket.create_connection(self._proxy.upstream, CONNECT_SECONDS)
            sock.settimeout(None)
            self._proxy.adopt(sock)
            self._upstream = Wire(sock)
        upstream = self._upstream
        upstream.sock.sendall(request.encode())
        _send(upstream.sock, self._client.request_body(request), chunked=request.chunked)
        while (answer := upstream.head()) is not None:
            if answer.status >= 200:
                return upstream, answer
        raise ConnectionError("closed without an answer")

    def _answer_wrongly(
        self, fault: Fault, answer: Head, pieces: Iterator[bytes], length: int | None
    ) -> None:
        client = self._client.sock
        answer, pieces = damaged_head(fault, answer), damaged_body(fault, answer, pieces, length)
        head = answer.encode()
        if fault.kind is FaultKind.HALF_HEADERS:
            client.sendall(head[: len(head) // 2])
            raise _HangUpError
        if fault.at == BEFORE_HEAD or length == 0:
            self._strike(fault)
        client.sendall(head)
        if fault.kind not in _STRIKES_IN_BODY or fault.at == BEFORE_HEAD:
            _send(client, pieces, chunked=answer.chunked)
            return
        at = within(fault.at, length)
        dripping = fault.kind is FaultKind.DRIP
        for start, piece in split_at(pieces, at):
            if start == at:
                self._strike(fault)
            if dripping and start >= at:
                self._drip(piece, fault, chunked=answer.chunked)
            else:
                _send(client, [piece], chunked=answer.chunked, last=False)
        if answer.chunked:
            client.sendall(b"0\r\n\r\n")

    def _strike(self, fault: Fault) -> None:
        if fault.kind in {FaultKind.RESET, FaultKind.TRUNCATE}:
            raise _HangUpError(reset=fault.kind is FaultKind.RESET)
        if fault.kind is FaultKind.STALL:
            self._wait(fault.seconds)

    def _drip(self, piece: bytes, fault: Fault, *, chunked: bool) -> None:
        for index in range(len(piece)):
            _send(self._client.sock, [piece[index : index + 1]], chunked=chunked, last=False)
            self._wait(DRIP_SECONDS if fault.seconds is None else fault.seconds)

    def _wait(self, seconds: float | None) -> None:
        """Do nothing for a while; hang up as soon as the client has, or the proxy is closed (both end its socket)."""
        ended = select.poll()
        ended.register(self._client.sock, select.POLLIN)
        if ended.poll(None if seconds is None else math.ceil(seconds * 1000)):
            raise _HangUpError


_STRIKES_IN_BODY = frozenset({FaultKind.RESET, FaultKind.TRUNCATE, FaultKind.STALL, FaultKind.DRIP})


def _body(upstream: Wire, request: Head, answer: Head) -> tuple[Iterator[bytes], int | None]:
    """An answer's body, decoded from its chunks, and its length if that is known (RFC 9112, 6.3)."""
    if request.start.startswith("HEAD ") or answer.status in {204, 304}:
        return iter(()), 0
    if answer.chunked:
        return upstream.chunks(), None
    if answer.length is None:
        return upstream.rest(), None
    return upstream.sized(answer.length), answer.length


def _send(
    sock: socket.socket, pieces: Iterable[bytes], *, chunked: bool, last: bool = True
) -> None:
    for piece in pieces:
        sock.sendall(b"%x\r\n%b\r\n" % (len(piece), piece) if chunked else piece)
    if chunked and last:
        sock.sendall(b"0\r\n\r\n")
