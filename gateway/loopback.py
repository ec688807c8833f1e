"""One HTTP request over a connection of its own, and its answer as it arrives: how Cog's server is asked.

Not httpx: its pool and its layers took 2.5 ms of a core for each prediction, a quarter of all that the gateway spent
(benchmarks/gateway.py); this takes 0.4. It is for a server on loopback that answers once: no TLS, no proxies, no
redirects. The parsing of HTTP is httptools', as in the server.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from urllib.parse import urlsplit

import httptools

CONNECT_S = 10.0
PIECE = 64 * 1024
# Servers hold a small piece back until the last one is acknowledged (Nagle), and Linux acknowledges late, after 40 ms,
# on a connection that has had a few: the end of a prediction would wait for that. To be asked for again and again.
_ACKNOWLEDGE_AT_ONCE: int | None = getattr(socket, "TCP_QUICKACK", None)


class BrokenOffError(ConnectionError):
    """The answer ended early, or is no HTTP."""


class Answer:
    """Its status, and its body piece by piece."""

    def __init__(self, reader: asyncio.StreamReader, connection: socket.socket | None) -> None:
        self._reader = reader
        self._connection = connection
        self._parser = httptools.HttpResponseParser(self)
        self._pieces: list[bytes] = []
        self._has_head = False
        self._is_whole = False

    @property
    def status(self) -> int:
        status: int = self._parser.get_status_code()
        return status

    async def begin(self) -> None:
        """Until status and headers are there. Raises OSError."""
        while not self._has_head:
            await self._receive()

    async def pieces(self) -> AsyncIterator[bytes]:
        """The body as it comes. Raises OSError where it ends early."""
        while True:
            pieces, self._pieces = self._pieces, []
            for piece in pieces:
                yield piece
            if self._is_whole:
                return
            await self._receive()

    async def _receive(self) -> None:
        data = await self._reader.read(PIECE)
        if not data:
            raise BrokenOffError("the connection was closed before the end of the answer")
        if self._connection is not None and _ACKNOWLEDGE_AT_ONCE is not None:
            self._connection.setsockopt(socket.IPPROTO_TCP, _ACKNOWLEDGE_AT_ONCE, 1)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            raise BrokenOffError(f"the answer is no HTTP ({type(error).__name__})") from error

    # What the parser calls.

    def on_headers_complete(self) -> None:
        self._has_head = True

    def on_body(self, piece: bytes) -> None:
        self._pieces.append(piece)

    def on_message_complete(self) -> None:
        self._is_whole = True


@asynccontextmanager
async def request(
    method: str, url: str, body: bytes, headers: Mapping[str, str]
) -> AsyncIterator[Answer]:
    """The answer, once its head is there; leaving the block closes the connection. Raises OSError."""
    address = urlsplit(url)
    async with asyncio.timeout(CONNECT_S):
        reader, writer = await asyncio.open_connection(address.hostname, address.port)
    try:
        told = {"Host": address.netloc, "Content-Length": str(len(body)), **headers}
        fields = "".join(f"{name}: {value}\r\n" for name, value in told.items())
        writer.write(f"{method} {address.path} HTTP/1.1\r\n{fields}\r\n".encode("ascii") + body)
        answer = Answer(reader, writer.get_extra_info("socket"))
        await answer.begin()
        yield answer
    finally:
        writer.close()
