"""A loopback server that stands in for S3 services the embedded one is not: old ones, and ones behind a bad wire.

It knows PUT alone: it checks Content-MD5 as AWS does, and refuses or honours If-None-Match as it is told. Signatures
are not looked at.
"""

from __future__ import annotations

import base64
import hashlib
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Self
from urllib.parse import unquote, urlsplit

STATUS = {"BadDigest": 400, "PreconditionFailed": 412, "NotImplemented": 501}


@dataclass
class PlainS3:
    """`objects` is what it holds, `asked` every PUT in order as (key, whether it had a condition)."""

    conditional_writes: bool = True
    damage: int = 0
    """How many bodies arrive with their first byte changed."""
    lose: int = 0
    """How many answers never arrive, though the object was stored."""
    objects: dict[str, bytes] = field(default_factory=dict)
    asked: list[tuple[str, bool]] = field(default_factory=list)

    def __enter__(self) -> Self:
        plain = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_PUT(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                key = unquote(urlsplit(self.path).path).lstrip("/")
                code = plain.put(key, body, self.headers)
                if code is None and plain.lose:
                    plain.lose -= 1
                    self.close_connection = True
                    return
                answer = f"<Error><Code>{code}</Code></Error>".encode() if code else b""
                self.send_response(STATUS[code] if code else 200)
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, format: str, *arguments: object) -> None:
                """Quiet: a failing test shows what was asked."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def endpoint_url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def put(self, key: str, body: bytes, headers: object) -> str | None:
        """Store, or say with which of S3's codes not."""
        header = headers.get  # type: ignore[attr-defined]
        conditional = header("If-None-Match") is not None
        self.asked.append((key, conditional))
        if conditional and not self.conditional_writes:
            return "NotImplemented"
        if self.damage:
            self.damage -= 1
            body = bytes([body[0] ^ 0xFF]) + body[1:]
        digest = hashlib.md5(body, usedforsecurity=False).digest()
        if header("Content-MD5") != base64.b64encode(digest).decode():
            return "BadDigest"
        if conditional and key in self.objects:
            return "PreconditionFailed"
        self.objects[key] = body
        return None
