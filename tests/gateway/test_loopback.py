"""An answer is read as it comes, whole, and never taken for whole when it is not."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest

from gateway.loopback import BrokenOffError, request

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def server(serve: Serve) -> AsyncIterator[str]:
    listening = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with listening:
        yield f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}/predictions/a%2Fb"


async def read_request(reader: asyncio.StreamReader) -> tuple[str, dict[str, str], bytes]:
    first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().strip().split("\r\n")
    fields = {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}
    return first, fields, await reader.readexactly(int(fields["Content-Length"]))


def answered(answer: bytes) -> list[bytes]:
    """What is read of an answer that ends with its connection."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(answer)
        writer.close()

    async def ask() -> list[bytes]:
        async with server(serve) as url, request("PUT", url, b"{}", {}) as got:
            return [piece async for piece in got.pieces()]

    return asyncio.run(ask())


def test_a_request_arrives_whole_and_its_answer_is_read_as_it_comes() -> None:
    async def check() -> None:
        seen = asyncio.Event()

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            first, fields, body = await read_request(reader)
            told = json.dumps([first, fields["Accept"], len(body)]).encode()
            writer.write(b"HTTP/1.1 409 Conflict\r\nTransfer-Encoding: chunked\r\n\r\n")
            writer.write(b"%x\r\n%b\r\n" % (len(told), told))
            await seen.wait()
            writer.write(b"3\r\nend\r\n0\r\n\r\n")

        body = bytes(1_000_000)
        async with (
            server(serve) as url,
            request("PUT", url, body, {"Accept": "text/event-stream"}) as answer,
        ):
            assert answer.status == 409
            pieces = answer.pieces()
            told = json.loads(await anext(pieces))
            assert told == ["PUT /predictions/a%2Fb HTTP/1.1", "text/event-stream", len(body)]
            seen.set()
            assert b"".join([piece async for piece in pieces]) == b"end"

    asyncio.run(check())


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"HTTP/1.1 200 OK\r\nContent-Le",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nfour",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nend\r\n",
        b"SSH-2.0-OpenSSH_9.6\r\n",
    ],
)
def test_an_answer_that_ends_early_or_is_none_is_an_error(answer: bytes) -> None:
    with pytest.raises(BrokenOffError):
        answered(answer)


def test_nobody_there_is_an_error() -> None:
    async def ask() -> None:
        async with server(lambda *_: asyncio.sleep(0)) as url:
            pass
        async with request("PUT", url, b"", {}):
            pass

    with pytest.raises(OSError, match=r"refused|Connect call failed"):
        asyncio.run(ask())


def test_to_leave_closes_the_connection() -> None:
    async def check() -> None:
        closed = asyncio.Event()

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await read_request(reader)
            writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n")
            assert await reader.read() == b""
            closed.set()

        async with server(serve) as url, asyncio.timeout(10):
            async with request("PUT", url, b"", {}) as answer:
                assert await anext(answer.pieces()) == b"a"
            await closed.wait()

    asyncio.run(check())
