"""Raw sockets: HTTP written by hand, nothing verified, nothing parsed. The best that wire and machine can do."""

from __future__ import annotations

import queue
import socket
import ssl
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from benchmarks.wire.memory import fresh_memory
from benchmarks.wire.target import KEY, MEBIBYTE, Held, Span, Target

RANGE = 16 * MEBIBYTE
HEAD_LIMIT = 16 * 1024


def prepare(target: Target, *, connections: int, fresh: bool = False) -> Callable[[], Held]:
    """Ranged GETs over keep-alive connections, into one reused buffer a connection, or with `fresh` into new memory."""
    context = ssl.create_default_context(cafile=target.certificate) if target.certificate else None

    def load() -> Held:
        waiting: queue.SimpleQueue[Span] = queue.SimpleQueue()
        for span in target.spans(RANGE):
            waiting.put(span)
        memory = fresh_memory(target.file_bytes) if fresh else None
        whole = None if memory is None else memoryview(memory)

        def work() -> int:
            buffer = memoryview(bytearray(RANGE)) if whole is None else None
            count = 0
            with _connect(target, context) as connection:
                while True:
                    try:
                        span = waiting.get_nowait()
                    except queue.Empty:
                        return count
                    into = (
                        buffer[: span.length]
                        if buffer is not None
                        else whole[span.place : span.place + span.length]  # type: ignore[index]
                    )
                    _get(connection, target, span, into)
                    count += span.length

        with ThreadPoolExecutor(connections) as pool:
            counts = [pool.submit(work) for _ in range(connections)]
        return Held(sum(count.result() for count in counts), memory)

    return load


def _connect(target: Target, context: ssl.SSLContext | None) -> socket.socket:
    plain = socket.create_connection((target.host, target.port))
    plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return context.wrap_socket(plain, server_hostname=target.host) if context else plain


def _get(connection: socket.socket, target: Target, span: Span, into: memoryview) -> None:
    last = span.start + span.length - 1
    connection.sendall(
        f"GET /{target.bucket}/{span.key} HTTP/1.1\r\nHost: {target.host}\r\nUser-Agent: {KEY}\r\n"
        f"Range: bytes={span.start}-{last}\r\n\r\n".encode()
    )
    received = b""
    while b"\r\n\r\n" not in received and len(received) < HEAD_LIMIT:
        piece = connection.recv(HEAD_LIMIT)
        if not piece:
            raise ConnectionError("the server closed the connection")
        received += piece
    head, _, body = received.partition(b"\r\n\r\n")
    if not head.startswith(b"HTTP/1.1 206"):
        raise ConnectionError(f"the server answered {head[:40]!r}")
    into[: len(body)] = body
    filled = len(body)
    while filled < len(into):
        count = connection.recv_into(into[filled:])
        if not count:
            raise ConnectionError("the server closed the connection")
        filled += count
