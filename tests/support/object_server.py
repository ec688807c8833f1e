"""A folder served as buckets over plain HTTP on loopback, fast enough that what is measured is the client.

It knows GET and HEAD, single ranges and conditions, and can be told to be as lax as some S3-compatible servers are.
It checks no signature, lists nothing and stores nothing: demo/s3.py does. The bottom of the wire (heads, bodies, a
server of one thread for each connection that closes without leaving any) is here too, for fault_proxy.py.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import re
import socket
import struct
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from email.utils import formatdate
from functools import partial
from http import HTTPStatus
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import unquote
from xml.sax.saxutils import escape

PIECE_BYTES = 64 * 1024
HEAD_BYTES = 32 * 1024
SENDFILE_BYTES = 1024 * 1024
CLOSE_SECONDS = 10.0

_RESET_ON_CLOSE = struct.pack("ii", 1, 0)
_SINGLE_RANGE = re.compile(r"bytes=(\d*)-(\d*)")


@dataclass(frozen=True)
class Head:
    """The start line and the fields of a request or an answer, in the order of the wire."""

    start: str
    fields: tuple[tuple[str, str], ...]

    @classmethod
    def parse(cls, data: bytes) -> Head:
        start, *lines = data.decode("latin-1").split("\r\n")
        split = (line.partition(":") for line in lines)
        return cls(start, tuple((name, value.strip()) for name, _, value in split))

    def encode(self) -> bytes:
        lines = (f"{name}: {value}\r\n" for name, value in self.fields)
        return f"{self.start}\r\n{''.join(lines)}\r\n".encode("latin-1")

    def get(self, name: str) -> str | None:
        """The field's value, or None; `name` in lower case."""
        return next((value for field, value in self.fields if field.lower() == name), None)

    def without(self, *names: str) -> Head:
        """The same head, lacking the fields that begin with one of `names` (lower case)."""
        kept = (field for field in self.fields if not field[0].lower().startswith(names))
        return replace(self, fields=tuple(kept))

    def changed(self, name: str, value: str) -> Head:
        """The same head with another value where it has this field; `name` in lower case."""
        fields = ((field, value if field.lower() == name else old) for field, old in self.fields)
        return replace(self, fields=tuple(fields))

    @property
    def status(self) -> int:
        return int(self.start.split(" ", 2)[1])

    @property
    def chunked(self) -> bool:
        return (self.get("transfer-encoding") or "").lower() == "chunked"

    @property
    def length(self) -> int | None:
        """What Content-Length says; None without one, or where chunks make it meaningless."""
        value = self.get("content-length")
        return None if value is None or self.chunked else int(value)

    @property
    def keeps_alive(self) -> bool:
        connection = (self.get("connection") or "").lower()
        return connection == "keep-alive" if "HTTP/1.0" in self.start else connection != "close"


class Wire:
    """A socket read through a buffer of at most 64 KiB, so that heads and bodies can follow each other on it.

    Whatever ends too early raises ConnectionError.
    """

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._held = b""

    def head(self) -> Head | None:
        """The next head; None when the other side has closed between two."""
        data = self._held
        while (end := data.find(b"\r\n\r\n")) < 0:
            if len(data) > HEAD_BYTES:
                raise ConnectionError(f"a head of more than {HEAD_BYTES} bytes")
            piece = self.sock.recv(HEAD_BYTES)
            if not piece:
                if data:
                    raise ConnectionError("closed in the middle of a head")
                return None
            data += piece
        self._held = data[end + 4 :]
        return Head.parse(data[:end])

    def sized(self, length: int) -> Iterator[bytes]:
        while length:
            piece = self._piece(length)
            if not piece:
                raise ConnectionError(f"closed {length} bytes before the end of a body")
            length -= len(piece)
            yield piece

    def chunks(self) -> Iterator[bytes]:
        """A chunked body's bytes; its trailers are read and dropped."""
        while size := int(self._line().partition(b";")[0], 16):
            yield from self.sized(size)
            self._line()
        while self._line():
            pass

    def rest(self) -> Iterator[bytes]:
        """A body that ends with the connection."""
        while piece := self._piece(PIECE_BYTES):
            yield piece

    def request_body(self, head: Head) -> Iterator[bytes]:
        return self.chunks() if head.chunked else self.sized(head.length or 0)

    def idle(self) -> bool:
        """Whether the other side has neither closed nor sent anything that was not asked for."""
        try:
            self.sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return not self._held
        except OSError:
            pass
        return False

    def _piece(self, most: int) -> bytes:
        if self._held:
            piece, self._held = self._held[:most], self._held[most:]
            return piece
        return self.sock.recv(min(most, PIECE_BYTES))

    def _line(self) -> bytes:
        while b"\r\n" not in self._held:
            piece = self.sock.recv(HEAD_BYTES)
            if not piece or len(self._held) > HEAD_BYTES:
                raise ConnectionError("a chunked body without an end")
            self._held += piece
        line, _, self._held = self._held.partition(b"\r\n")
        return line


class LoopbackServer:
    """A context manager that listens on 127.0.0.1, with one thread named `<name>-…` for each connection.

    Closing it ends every connection and joins every thread; it raises when one is still there after ten seconds.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._lock = threading.Lock()
        self._closed = False
        self._sockets: set[socket.socket] = set()
        self._threads: set[threading.Thread] = set()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
        self.port: int = self._listener.getsockname()[1]
        self._accepting = threading.Thread(target=self._accept, name=f"{name}-accept", daemon=True)
        self._accepting.start()

    def serve(self, client: socket.socket) -> None:
        """Talk to one client until its connection is to be closed; an OSError ends it too."""
        raise NotImplementedError

    @property
    def endpoint_url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        with self._lock:
            if self._closed:
                return
            self._closed = True
        # Closing a listener does not wake the thread in accept(), on Linux; a connection does.
        with contextlib.suppress(OSError):
            socket.create_connection(("127.0.0.1", self.port), CLOSE_SECONDS).close()
        self._accepting.join(CLOSE_SECONDS)
        with self._lock:
            for sock in self._sockets:
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)
        threads = {self._accepting, *self._threads}
        for thread in threads:
            thread.join(CLOSE_SECONDS)
        left = sorted(thread.name for thread in threads if thread.is_alive())
        if left:
            raise RuntimeError(f"{self._name} was closed, but these threads go on: {left}")

    def adopt(self, sock: socket.socket) -> None:
        """Have the socket end with the server; until then it is to be given to `release`."""
        with self._lock:
            if self._closed:
                sock.close()
                raise ConnectionAbortedError("the server is closed")
            self._sockets.add(sock)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def release(self, sock: socket.socket, *, reset: bool = False) -> None:
        """Close the socket: with a FIN, or with a RST that throws away what was not yet sent."""
        with self._lock:
            if sock not in self._sockets:
                return
            self._sockets.remove(sock)
        if reset:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
        sock.close()

    def _accept(self) -> None:
        with self._listener:
            for number in itertools.count(1):
                client, _ = self._listener.accept()
                if self._closed:
                    client.close()
                    return
                name = f"{self._name}-{number}"
                thread = threading.Thread(
                    target=self._converse, args=(client,), name=name, daemon=True
                )
                thread.start()
                self._threads = {other for other in self._threads if other.is_alive()} | {thread}

    def _converse(self, client: socket.socket) -> None:
        # An OSError is a client that went away, or this server closing: there is nobody to tell.
        with contextlib.suppress(OSError):
            self.adopt(client)
            try:
                self.serve(client)
            finally:
                self.release(client)


def s3_error(
    status: int,
    code: str,
    message: str,
    *,
    fields: tuple[tuple[str, str], ...] = (),
    details: str = "",
    with_body: bool = True,
) -> bytes:
    """A whole answer as S3 gives it for an error: `details` are further elements, `with_body` is False for HEAD."""
    body = (
        '<?xml version="1.0" encoding="UTF-8"?>\n'
        f"<Error><Code>{code}</Code><Message>{escape(message)}</Message>{details}</Error>"
    ).encode()
    content = (("Content-Type", "application/xml"), ("Content-Length", str(len(body))))
    head = Head(status_line(status), (*fields, *content)).encode()
    return head + body if with_body else head


def status_line(status: int) -> str:
    return f"HTTP/1.1 {status} {HTTPStatus(status).phrase}"


@dataclass
class ObjectRequest:
    """One request as the server saw it; `body_bytes` grows while its answer is being sent."""

    method: str
    bucket: str
    key: str
    range: str | None
    status: int
    body_bytes: int = 0


@dataclass(frozen=True)
class _Version:
    """What one content of a file has in its answers."""

    size: int
    etag: str
    last_modified: str


def selected_range(value: str | None, size: int) -> tuple[int, int] | None:
    """First byte and length of what a Range field selects of `size` bytes; the length is 0 when it lies outside.

    None where the field is missing or no single range, which is to be ignored (RFC 9110, 14.2).
    """
    match = _SINGLE_RANGE.fullmatch(value or "")
    first, last = match.groups() if match else ("", "")
    if first:
        end = min(int(last), size - 1) if last else size - 1
        backwards = bool(last) and int(last) < int(first)
        return None if backwards else (int(first), max(0, end - int(first) + 1))
    if last:
        length = min(int(last), size)
        return size - length, length
    return None


class ObjectServer(LoopbackServer):
    """Serves `folder/<bucket>/<key>` at `/<bucket>/<key>`; the ETag is the content's MD5.

    ignore_range: answers 200 with the whole object, whatever range was asked for.
    range_as_200: answers a range rightly, Content-Range included, but with status 200, as `rclone serve s3` does.
    ignore_conditions: looks at neither If-Match nor If-None-Match, as TAG (a cache before Tigris) does with If-Match.
    require_bucket_host: takes the bucket from the Host field's first label, and refuses a Host without one.
    """

    def __init__(
        self,
        folder: Path,
        *,
        ignore_range: bool = False,
        range_as_200: bool = False,
        ignore_conditions: bool = False,
        require_bucket_host: bool = False,
    ) -> None:
        self._folder = folder
        self._ignore_range = ignore_range
        self._range_as_200 = range_as_200
        self._ignore_conditions = ignore_conditions
        self._require_bucket_host = require_bucket_host
        self._hashing = threading.Lock()
        self._versions: dict[tuple[Path, int, int, int], _Version] = {}
        self._requests: list[ObjectRequest] = []
        super().__init__("object-server")

    def requests(self, key: str | None = None) -> list[ObjectRequest]:
        """The requests so far, in the order of their answers: all of them, or those of one key."""
        with self._lock:
            return [request for request in self._requests if key in {None, request.key}]

    def bytes_sent(self, key: str | None = None) -> int:
        """Bytes of bodies: of all objects, or of those with this key. Errors' own words do not count."""
        return sum(request.body_bytes for request in self.requests(key))

    def forget_requests(self) -> None:
        with self._lock:
            self._requests.clear()

    def serve(self, client: socket.socket) -> None:
        wire = Wire(client)
        while (request := wire.head()) is not None:
            for _ in wire.request_body(request):
                pass
            self._answer(client, request)
            if not request.keeps_alive:
                return

    def _answer(self, client: socket.socket, request: Head) -> None:
        method, target, _ = request.start.split(" ", 2)
        bucket, key = self._address(target, request.get("host") or "")
        file = self._open(bucket, key) if method in {"GET", "HEAD"} else None
        if file is None:
            status, code, message = self._refusal(method, bucket, key)
            self._note(method, bucket, key, request, status)
            client.sendall(s3_error(status, code, message, with_body=method != "HEAD"))
            return
        with file:
            version = self._version(file, self._folder / bucket / key)
            status, place = self._outcome(request, version)
            record = self._note(method, bucket, key, request, status)
            if status >= 300:
                client.sendall(_without_object(status, version, with_body=method != "HEAD"))
                return
            head = _object_head(status, version, place)
            if method == "HEAD":
                client.sendall(head)
            else:
                _send_file(client, head, file, place or (0, version.size), record)

    def _outcome(self, request: Head, version: _Version) -> tuple[int, tuple[int, int] | None]:
        """The status, and the range that was asked for and is to be answered."""
        if not self._ignore_conditions:
            wanted, known = request.get("if-match"), request.get("if-none-match")
            if wanted is not None and not _names(wanted, version.etag):
                return 412, None
            if known is not None and _names(known, version.etag):
                return 304, None
        place = None if self._ignore_range else selected_range(request.get("range"), version.size)
        if place is None:
            return 200, None
        if not place[1]:
            return 416, None
        return (200 if self._range_as_200 else 206), place

    def _address(self, target: str, host: str) -> tuple[str, str]:
        """Bucket and key; no bucket where its name is required in the Host field and is not there."""
        path = unquote(target.partition("?")[0]).removeprefix("/")
        if not self._require_bucket_host:
            bucket, _, key = path.partition("/")
            return bucket, key
        name = host.partition(":")[0]
        bucket, dot, _ = name.partition(".")
        return (bucket if dot and not name.replace(".", "").isdigit() else ""), path

    def _open(self, bucket: str, key: str) -> FileIO | None:
        if {"", ".", ".."} & {bucket, *key.split("/")}:
            return None
        try:
            return FileIO(self._folder / bucket / key)
        except (OSError, ValueError):  # missing, a folder, or no name for a file
            return None

    def _refusal(self, method: str, bucket: str, key: str) -> tuple[int, str, str]:
        if not bucket and self._require_bucket_host:
            return 400, "InvalidRequest", "the bucket's name belongs in the Host field"
        if method not in {"GET", "HEAD"}:
            return 405, "MethodNotAllowed", f"{method} is not served here"
        if bucket in {"", ".", ".."} or not (self._folder / bucket).is_dir():
            return 404, "NoSuchBucket", f"no bucket {bucket!r}"
        return 404, "NoSuchKey", f"no key {key!r}"

    def _version(self, file: FileIO, path: Path) -> _Version:
        stat = os.fstat(file.fileno())
        # The inode too: a file that replaces another within the clock's tick (4 ms) has its time.
        content = (path, stat.st_ino, stat.st_mtime_ns, stat.st_size)
        with self._hashing:  # one at a time: many connections begin with the same object
            version = self._versions.get(content)
            if version is None:
                digest = hashlib.file_digest(file, partial(hashlib.md5, usedforsecurity=False))
                modified = formatdate(stat.st_mtime, usegmt=True)
                version = _Version(stat.st_size, f'"{digest.hexdigest()}"', modified)
                self._versions[content] = version
        return version

    def _note(
        self, method: str, bucket: str, key: str, request: Head, status: int
    ) -> ObjectRequest:
        """Written down before the answer goes out: who has read an answer finds its request here."""
        record = ObjectRequest(method, bucket, key, request.get("range"), status)
        with self._lock:
            self._requests.append(record)
        return record


def _object_head(status: int, version: _Version, place: tuple[int, int] | None) -> bytes:
    first, length = place or (0, version.size)
    fields = [
        ("ETag", version.etag),
        ("Last-Modified", version.last_modified),
        ("Accept-Ranges", "bytes"),
        ("Content-Type", "binary/octet-stream"),
        ("Content-Length", str(length)),
    ]
    if place is not None:
        fields.append(("Content-Range", f"bytes {first}-{first + length - 1}/{version.size}"))
    return Head(status_line(status), tuple(fields)).encode()


def _without_object(status: int, version: _Version, *, with_body: bool) -> bytes:
    if status == 304:
        return Head(status_line(304), (("ETag", version.etag),)).encode()
    if status == 412:
        message = "the object has another ETag"
        return s3_error(412, "PreconditionFailed", message, with_body=with_body)
    message = f"the object has {version.size} bytes"
    fields = (("Content-Range", f"bytes */{version.size}"),)
    return s3_error(416, "InvalidRange", message, fields=fields, with_body=with_body)


def _names(condition: str, etag: str) -> bool:
    """Whether a list of ETags, or `*`, includes this one; weak ones compare as strong."""
    named = {entry.strip().removeprefix("W/").strip('"') for entry in condition.split(",")}
    return bool(named & {"*", etag.strip('"')})


def _send_file(
    client: socket.socket, head: bytes, file: FileIO, place: tuple[int, int], record: ObjectRequest
) -> None:
    first, length = place
    if length <= PIECE_BYTES:  # one packet and one call: most of what small objects cost
        record.body_bytes = length
        client.sendall(head + os.pread(file.fileno(), length, first))
        return
    client.sendall(head)
    while length:
        step = min(length, SENDFILE_BYTES)
        sent = 0
        record.body_bytes += step
        try:
            sent = os.sendfile(client.fileno(), file.fileno(), first, step)
        finally:
            record.body_bytes -= step - sent
        if not sent:
            raise ConnectionError("the file has become shorter than its answer's head says")
        first, length = first + sent, length - sent
