"""A loopback server that stands in for S3 services the embedded one is not: old ones, and ones behind a bad wire.

It knows PUT and GET alone: it checks Content-MD5 as AWS does, and honours, refuses or ignores If-None-Match and
If-Match as it is told. Signatures are not looked at.
"""

from __future__ import annotations

import base64
import hashlib
import threading
from dataclasses import dataclass, field
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Self
from urllib.parse import unquote, urlsplit

from settings import StorageSettings, load_storage_settings

TIMEOUT_S = 60.0
STATUS = {
    "BadDigest": 400,
    "NoSuchKey": 404,
    "ConditionalRequestConflict": 409,
    "PreconditionFailed": 412,
    "NotImplemented": 501,
}


@dataclass
class PlainS3:
    """`objects` is what it holds, `asked` every PUT in order as (key, whether it had a condition)."""

    conditional_writes: bool = True
    ignored: tuple[str, ...] = ()
    """The conditions that it takes, as some servers do, and writes all the same."""
    conflict: int = 0
    """How many conditional PUTs meet another that is under way."""
    damage: int = 0
    """How many bodies arrive with their first byte changed."""
    lose: int = 0
    """How many answers never arrive, though the object was stored."""
    keep: int = 0
    """How many answers are kept back until the server ends, though the object was stored."""
    kept: threading.Event = field(default_factory=threading.Event)
    """Whether one is."""
    objects: dict[str, bytes] = field(default_factory=dict)
    asked: list[tuple[str, bool]] = field(default_factory=list)

    def __enter__(self) -> Self:
        plain = self
        self._ending = threading.Event()

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
                if code is None and plain.keep:
                    plain.keep -= 1
                    plain.kept.set()
                    plain._ending.wait(TIMEOUT_S)
                    self.close_connection = True
                    return
                answer = f"<Error><Code>{code}</Code></Error>".encode() if code else b""
                self.answer(code, answer, etag(body))

            def do_GET(self) -> None:
                body = plain.objects.get(unquote(urlsplit(self.path).path).lstrip("/"))
                if body is None:
                    self.answer("NoSuchKey", b"<Error><Code>NoSuchKey</Code></Error>", "")
                else:
                    self.answer(None, body, etag(body))

            def answer(self, code: str | None, body: bytes, etag: str) -> None:
                self.send_response(STATUS[code] if code else 200)
                self.send_header("Content-Length", str(len(body)))
                self.send_header("Last-Modified", formatdate(usegmt=True))
                self.send_header("ETag", etag)
                self.end_headers()
                self.wfile.write(body)

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
        self._ending.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def storage(self) -> StorageSettings:
        """With keys at which nobody looks."""
        keys = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"}
        return load_storage_settings({**keys, "AWS_ENDPOINT_URL_S3": self.endpoint_url})

    @property
    def endpoint_url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def put(self, key: str, body: bytes, headers: object) -> str | None:
        """Store, or say with which of S3's codes not."""
        header = headers.get  # type: ignore[attr-defined]
        expected = header("If-Match")
        conditions = [name for name in ("If-None-Match", "If-Match") if header(name) is not None]
        conditional = bool(conditions)
        self.asked.append((key, conditional))
        if conditional and not self.conditional_writes:
            return "NotImplemented"
        if self.damage:
            self.damage -= 1
            body = bytes([body[0] ^ 0xFF]) + body[1:]
        digest = hashlib.md5(body, usedforsecurity=False).digest()
        if header("Content-MD5") != base64.b64encode(digest).decode():
            return "BadDigest"
        if conditional and not set(conditions) <= set(self.ignored):
            if self.conflict:
                self.conflict -= 1
                return "ConditionalRequestConflict"
            there = self.objects.get(key)
            if expected is None and there is not None:
                return "PreconditionFailed"
            if expected is not None and (there is None or etag(there) != expected):
                return "NoSuchKey" if there is None else "PreconditionFailed"
        self.objects[key] = body
        return None


def etag(body: bytes) -> str:
    return f'"{hashlib.md5(body, usedforsecurity=False).hexdigest()}"'
