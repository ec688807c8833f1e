"""One HTTP/1.1 connection whose bodies are read straight into memory that is already there.

It knows sockets, TLS and HTTP's framing, and nothing of S3. A plain connection is read with MSG_WAITALL: one system
call fills mebibytes without the interpreter, so that reading goes on while other threads import.
"""

from __future__ import annotations

import contextlib
import io
import socket
import struct
import time
from dataclasses import dataclass, field
from http.client import HTTPException, parse_headers
from typing import TYPE_CHECKING

from weights.tls import TlsContext, TlsStream, UntrustedError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from email.message import Message

HEAD_LIMIT = 64 * 1024  # bytes; S3's own heads have below 2 KiB
TICK = 0.5  # seconds after which a read returns with what it has, to see whether it has stalled


class TransportError(Exception):
    """The connection failed; asking again over another may help. The message names no secret."""


class UnreachableError(TransportError):
    """No connection came about: the name is unknown, nobody listens, or nobody answers."""


class CertificateError(TransportError):
    """The server's TLS certificate was not accepted. Asking again does not help."""


class BrokenError(TransportError):
    """The answer ended before its end, or is not HTTP."""


class StalledError(TransportError):
    """The server sends nothing, or next to nothing."""


class AbortedError(TransportError):
    """Somebody here has given this connection up."""


@dataclass(frozen=True)
class Patience:
    """How long to wait for what, in seconds, and what counts as a stall."""

    connect: float = 10.0
    stall: float = 15.0
    floor: int = 4096  # bytes per second over `stall` seconds; below that it is as good as dead
    pause: float = 0.2  # before a second attempt; doubled before each further one


@dataclass(frozen=True)
class Address:
    """Where a connection goes. With a proxy, TLS runs through a tunnel and plain requests name the whole URL."""

    scheme: str
    host: str
    port: int
    proxy: tuple[str, int] | None = None
    proxy_authorization: str | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Head:
    """An answer's first lines. `length` is that of its body in bytes; None where the server does not say."""

    status: int
    headers: Message
    length: int | None

    def get(self, name: str) -> str | None:
        return self.headers.get(name)


class Connection:
    """A keep-alive connection to one server; opened at the first request. For one thread, but for `abort`."""

    def __init__(
        self, address: Address, tls: TlsContext | None, patience: Patience | None = None
    ) -> None:
        self._address = address
        self._tls = tls
        self._patience = patience or Patience()
        self._socket: socket.socket | None = None
        self._secure: TlsStream | None = None
        self._surplus = memoryview(b"")  # of the body, that came along with the head
        self._left: int | None = (
            0  # bytes of the body still to be read; None: until the server closes
        )
        self._tick = min(TICK, self._patience.stall)
        self._aborted = False
        self._keeps = True
        self._chunked = False
        self._watched_seconds = 0.0
        self._watched_bytes = 0

    @property
    def reusable(self) -> bool:
        """Whether the last answer was read to its end and the server keeps the connection."""
        return self._socket is not None and self._keeps and self._left == 0 and not self._aborted

    @property
    def aborted(self) -> bool:
        return self._aborted

    def request(self, target: str, headers: Mapping[str, str]) -> Head:
        """Send a GET and read the answer's head. Raises TransportError."""
        found = self._socket or self._open()
        lines = [f"GET {self._target(target)} HTTP/1.1"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        if self._tls is None and self._address.proxy and self._address.proxy_authorization:
            lines.append(f"Proxy-Authorization: {self._address.proxy_authorization}")
        message = "\r\n".join([*lines, "", ""]).encode("latin-1")
        self._watch()
        try:
            (self._secure or found).sendall(message)
        except OSError as error:
            raise self._failure(BrokenError(_reason(error))) from error
        return self._read_head()

    def read(self, into: memoryview) -> int:
        """Read some of the body, at least a byte and as much as comes within a tick. Raises TransportError."""
        if self._left is not None:
            into = into[: self._left]
        if self._surplus:
            count = min(len(into), len(self._surplus))
            into[:count] = self._surplus[:count]
            self._surplus = self._surplus[count:]
        else:
            count = self._receive(into)
        if self._left is not None:
            self._left -= count
        return count

    def read_rest(self, limit: int) -> bytes:
        """The rest of the body, at most `limit` bytes of it."""
        if self._chunked:
            return self._read_chunked(limit)
        wanted = limit if self._left is None else min(self._left, limit)
        data = bytearray(wanted)
        filled = 0
        while filled < wanted:
            try:
                filled += self.read(memoryview(data)[filled:])
            except BrokenError:
                if self._left is not None:
                    raise
                break  # the server closed: that was the end
        return bytes(data[:filled])

    def _read_chunked(self, limit: int) -> bytes:
        """A body in chunks (RFC 9112, 7.1), at most `limit` bytes of it. Raises BrokenError."""
        received = bytearray()
        body = bytearray()
        buffer = memoryview(bytearray(4096))
        position = 0
        while len(body) < limit:
            if (end := received.find(b"\r\n", position)) >= 0:
                try:
                    size = int(received[position:end].partition(b";")[0], 16)
                except ValueError:
                    raise BrokenError("it does not speak HTTP") from None
                if not size:
                    break
                if size < 0 or size > limit:
                    raise BrokenError("its answer is endless")
                if len(received) >= end + 2 + size + 2:
                    body += received[end + 2 : end + 2 + size]
                    position = end + 2 + size + 2
                    continue
            elif len(received) - position > HEAD_LIMIT:
                raise BrokenError("it does not speak HTTP")
            if self._surplus:
                received += self._surplus
                self._surplus = memoryview(b"")
            else:
                received += buffer[: self._receive(buffer, whole=False)]
        return bytes(body[:limit])

    def abort(self) -> None:
        """From any thread: wake whoever reads here, with an AbortedError."""
        self._aborted = True
        found = self._socket
        if found is not None:
            with contextlib.suppress(OSError):
                found.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._keeps = False
        if self._socket is not None:
            self._socket.close()

    def _target(self, target: str) -> str:
        address = self._address
        if address.proxy and self._tls is None:
            host = f"[{address.host}]" if ":" in address.host else address.host
            return f"http://{host}:{address.port}{target}"
        return target

    def _open(self) -> socket.socket:
        address = self._address
        where = address.proxy or (address.host, address.port)
        try:
            found = socket.create_connection(where, timeout=self._patience.connect)
        except (
            OSError,
            UnicodeError,
        ) as error:  # a host name that no encoding of names can express
            raise UnreachableError(f"{where[0]}:{where[1]}: {_reason(error)}") from error
        self._socket = found
        self._keeps = True
        try:
            found.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            found.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            if self._tls is not None:
                if address.proxy:
                    self._tunnel(found)
                _wait_in_the_kernel(found, self._patience.connect)
                self._secure = TlsStream(found, self._tls, address.host)
            _wait_in_the_kernel(found, self._tick)
        except UntrustedError as error:
            self.close()
            raise CertificateError(str(error)) from error
        except OSError as error:
            self.close()
            raise UnreachableError(f"{address.host}:{address.port}: {_reason(error)}") from error
        return found

    def _tunnel(self, found: socket.socket) -> None:
        host = f"{self._address.host}:{self._address.port}"
        lines = [f"CONNECT {host} HTTP/1.1", f"Host: {host}"]
        if self._address.proxy_authorization:
            lines.append(f"Proxy-Authorization: {self._address.proxy_authorization}")
        found.sendall("\r\n".join([*lines, "", ""]).encode("latin-1"))
        answer = b""
        while b"\r\n\r\n" not in answer and len(answer) < HEAD_LIMIT:
            byte = found.recv(1)  # not one more: what follows is TLS
            if not byte:
                raise UnreachableError("the proxy closed the connection")
            answer += byte
        status = answer.split(b"\r\n", 1)[0].decode("latin-1")
        if " 200" not in status:
            raise UnreachableError(f"the proxy refuses a tunnel ({status})")

    def _read_head(self) -> Head:
        received = bytearray()
        buffer = memoryview(bytearray(16 * 1024))
        while (end := received.find(b"\r\n\r\n")) < 0:
            if len(received) > HEAD_LIMIT:
                raise BrokenError("its first lines are endless: it does not speak HTTP")
            received += buffer[: self._receive(buffer, whole=False)]
        line, _, fields = bytes(received[: end + 4]).partition(b"\r\n")
        try:
            protocol, status, *_ = line.split(b" ", 2)
            headers: Message = parse_headers(io.BytesIO(fields))
            length = headers.get("Content-Length")
            head = Head(int(status), headers, None if length is None else int(length))
        except (ValueError, HTTPException):
            raise BrokenError("it does not speak HTTP") from None
        if not protocol.startswith(b"HTTP/1.") or (head.length or 0) < 0:
            raise BrokenError("it does not speak HTTP/1.1")
        if 100 <= head.status < 200:
            raise BrokenError(f"it answered {head.status}, which nobody asked for")
        self._chunked = bool(headers.get("Transfer-Encoding"))
        if self._chunked:
            if head.status < 300:
                raise BrokenError("its answer has no length of its own (Transfer-Encoding)")
            head = Head(
                head.status, headers, None
            )  # an error document of AWS's own: short, and its last words
        closing = (
            self._chunked
            or headers.get("Connection", "").lower() == "close"
            or protocol == b"HTTP/1.0"
        )
        self._keeps = not closing
        self._surplus = memoryview(bytes(received[end + 4 :]))
        self._left = 0 if head.status in (204, 304) else head.length
        if self._left is not None and len(self._surplus) > self._left:
            self._keeps = False  # more than it announced: whatever that is, it is no next answer
        return head

    def _receive(self, into: memoryview, *, whole: bool = True) -> int:
        """Receive at least a byte: until `into` is full where `whole`, or until a tick has passed."""
        while True:
            started = time.monotonic()
            try:
                count = self._receive_once(into, whole=whole)
            except (BlockingIOError, TimeoutError):
                count = 0  # a tick without a byte
            except OSError as error:
                raise self._failure(BrokenError(_reason(error))) from error
            else:
                if self._aborted or not count:
                    raise self._failure(BrokenError("the connection closed early"))
            self._see(count, time.monotonic() - started)
            if count:
                return count

    def _receive_once(self, into: memoryview, *, whole: bool) -> int:
        found = self._socket
        if found is None:
            raise BrokenError("nothing was asked")
        if self._secure is not None:
            return self._secure.recv_into(into, whole=whole, seconds=self._tick)
        return found.recv_into(into, 0, socket.MSG_WAITALL if whole else 0)

    def _watch(self) -> None:
        self._watched_seconds = 0.0
        self._watched_bytes = 0

    def _see(self, count: int, seconds: float) -> None:
        """Count what arrives, and the time spent waiting for it: no time in which nobody here wanted to read.

        Raises StalledError at the end of a window in which next to nothing came.
        """
        if self._aborted:
            raise self._failure(AbortedError("given up"))
        self._watched_bytes += count
        self._watched_seconds += seconds
        if self._watched_seconds < self._patience.stall:
            return
        if self._watched_bytes < self._patience.floor * self._watched_seconds:
            raise self._failure(
                StalledError(
                    f"{self._watched_bytes} bytes in {self._watched_seconds:.1f} s from {self._address.host}"
                )
            )
        self._watch()

    def _failure(self, error: TransportError) -> TransportError:
        """Close, since an answer cut short is of no use; and whose doing it was decides what it is called."""
        self.close()
        return AbortedError("given up") if self._aborted else error


def _wait_in_the_kernel(found: socket.socket, limit: float) -> None:
    """Blocking for Python, so that MSG_WAITALL and OpenSSL wait in the kernel, there for `limit` seconds."""
    found.settimeout(None)
    seconds, rest = divmod(limit, 1)
    packed = struct.pack("@ll", int(seconds), int(rest * 1_000_000))
    found.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, packed)


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
