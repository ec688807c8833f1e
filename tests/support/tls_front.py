"""What stands before an ObjectServer on the way to it: TLS with certificates as told, or a proxy that knows CONNECT."""

from __future__ import annotations

import base64
import select
import socket
import ssl
from collections.abc import Callable
from dataclasses import dataclass

from tests.support.object_server import LoopbackServer, ObjectServer, Wire


@dataclass(frozen=True)
class Cut:
    """The answer to the first request for a key that ends in `suffix` ends after `at` bytes of its body."""

    suffix: str
    at: int
    with_close_notify: bool


class TlsFront(LoopbackServer):
    """Speaks TLS before an ObjectServer, and keeps each connection for as long as the client wants it.

    `context_of` gives the certificate of each connection, by its number from 1. `single` closes each connection after
    one answer, without having said so.
    """

    def __init__(
        self,
        upstream: ObjectServer,
        context_of: Callable[[int], ssl.SSLContext],
        *,
        cut: Cut | None = None,
        single: bool = False,
    ) -> None:
        self._upstream = ("127.0.0.1", upstream.port)
        self._context_of = context_of
        self._cut = cut
        self._single = single
        self.connections = 0
        self.versions: set[str | None] = set()
        self.requests: list[tuple[str, str | None]] = []  # path and range
        super().__init__("tls-front")

    @property
    def endpoint_url(self) -> str:
        return f"https://localhost:{self.port}"

    def ranges(self, suffix: str) -> list[tuple[int, int]]:
        """First and last byte of each request for a key that ends in `suffix`."""
        asked = [
            wanted.removeprefix("bytes=").split("-")
            for path, wanted in self.requests
            if path.endswith(suffix) and wanted
        ]
        return [(int(first), int(last)) for first, last in asked]

    def serve(self, client: socket.socket) -> None:
        with self._lock:
            self.connections += 1
            context = self._context_of(self.connections)
        secure = context.wrap_socket(client, server_side=True, do_handshake_on_connect=False)
        self.adopt(secure)
        upstream = socket.create_connection(self._upstream)
        self.adopt(upstream)
        try:
            secure.do_handshake()
            self.versions.add(secure.version())
            wire, behind = Wire(secure), Wire(upstream)
            while self._answer(wire, behind) and not self._single:
                pass
        finally:
            self.release(upstream)
            self.release(secure)  # without a close_notify, as many a server does

    def _answer(self, wire: Wire, behind: Wire) -> bool:
        request = wire.head()
        if request is None:
            return False
        path = request.start.split(" ")[1]
        behind.sock.sendall(request.encode())
        answer = behind.head()
        assert answer is not None
        with self._lock:
            self.requests.append((path, request.get("range")))
            cut = self._cut if self._cut and path.endswith(self._cut.suffix) else None
            if cut:
                self._cut = None
        wire.sock.sendall(answer.encode())
        left = cut.at if cut else None
        for piece in behind.sized(0 if answer.status == 304 else answer.length or 0):
            wire.sock.sendall(piece[:left])
            if left is not None:
                left -= len(piece)
                if left <= 0:
                    break
        if cut and cut.with_close_notify:
            assert isinstance(wire.sock, ssl.SSLSocket)
            wire.sock.settimeout(5)
            wire.sock.unwrap()
        return not cut


class ConnectProxy(LoopbackServer):
    """An HTTP proxy that knows CONNECT and nothing else; with `password`, only for who sends it."""

    def __init__(self, *, user: str = "", password: str = "") -> None:
        pair = base64.b64encode(f"{user}:{password}".encode()).decode()
        self._wanted = f"Basic {pair}" if password else None
        self.targets: list[str] = []
        self.refused = 0
        super().__init__("connect-proxy")

    def serve(self, client: socket.socket) -> None:
        head = Wire(client).head()
        assert head is not None
        method, target, _ = head.start.split(" ")
        if method != "CONNECT" or head.get("proxy-authorization") != self._wanted:
            self.refused += 1
            client.sendall(b"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n")
            return
        self.targets.append(target)
        host, _, port = target.rpartition(":")
        upstream = socket.create_connection((host, int(port)))
        self.adopt(upstream)
        try:
            client.sendall(b"HTTP/1.1 200 Connection established\r\nVia: 1.1 proxy\r\n\r\n")
            others = {client: upstream, upstream: client}
            while True:
                for ready in select.select(list(others), [], [])[0]:
                    piece = ready.recv(256 * 1024)
                    if not piece:
                        return
                    others[ready].sendall(piece)
        finally:
            self.release(upstream)
