"""Cog's events are read as they come; an answer that ends early is never taken for whole."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from typing import Any

import pytest

from gateway.cog_client import CogBusyError, CogClient, CogLostError, merge_metric, new_session
from gateway.event_stream import Event
from gateway.refusals import Refused

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
START = Event("start", {"id": "a/b"})
COMPLETED = Event("completed", {"id": "a/b", "status": "succeeded"})
CRASHED = Event("completed", {"id": "a/b", "status": "failed", "error": "Worker crashed"})


class Cog:
    """Where Cog's server is; `looks` is how often somebody thought that it may be dead."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.looks = 0

    def look(self) -> None:
        self.looks += 1


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


async def read_request(reader: asyncio.StreamReader) -> tuple[str, dict[str, str], Any]:
    first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().strip().split("\r\n")
    fields = {
        name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)
    }
    return first, fields, json.loads(await reader.readexactly(int(fields["content-length"])))


@asynccontextmanager
async def asking(serve: Serve) -> AsyncIterator[tuple[CogClient, Cog]]:
    listening = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with listening, new_session() as session:
        cog = Cog(f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}")
        yield CogClient(cog, session), cog


def events_of(answer: bytes) -> tuple[list[Event], Cog]:
    """What is read of an answer that ends with its connection."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(answer)
        writer.close()

    async def ask() -> tuple[list[Event], Cog]:
        async with asking(serve) as (client, cog):
            try:
                return [event async for event in client.predict("a/b", {})], cog
            except Exception as error:
                error.add_note(str(cog.looks))
                raise

    return asyncio.run(ask())


def test_a_request_arrives_whole_and_its_events_are_read_as_they_come() -> None:
    async def check() -> None:
        seen = asyncio.Event()
        asked: list[Any] = []

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            asked.append(await read_request(reader))
            writer.write(HEAD + chunk(START.encode()))
            await seen.wait()
            writer.write(chunk(COMPLETED.encode()) + b"0\r\n\r\n")

        async with asking(serve) as (client, cog):
            events = client.predict("a.b-1", {"prompt": "x" * 500_000}, {"trace": "t"})
            assert await anext(events) == START
            seen.set()
            assert [event async for event in events] == [COMPLETED]
            assert cog.looks == 0
        ((first, fields, body),) = asked
        assert first == "PUT /predictions/a.b-1 HTTP/1.1"
        assert fields["accept"] == "text/event-stream"
        assert body == {
            "id": "a.b-1",
            "input": {"prompt": "x" * 500_000},
            "context": {"trace": "t"},
        }

    asyncio.run(check())


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"HTTP/1.1 200 OK\r\nContent-Le",
        HEAD + chunk(START.encode()),
        HEAD + chunk(START.encode()) + b"0\r\n\r\n",
        HEAD + chunk(b"event: log\ndata: nothing\n\n") + b"0\r\n\r\n",
        HEAD + chunk(START.encode() + CRASHED.encode()) + b"0\r\n\r\n",
        b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 0\r\n\r\n",
        b"SSH-2.0-OpenSSH_9.6\r\n",
    ],
)
def test_an_answer_without_the_end_of_its_prediction_is_a_loss(answer: bytes) -> None:
    with pytest.raises(CogLostError):
        events_of(answer)


@pytest.mark.parametrize("status", [b"409 Conflict", b"503 Service Unavailable"])
def test_no_free_slot_is_no_failure_and_is_looked_into(status: bytes) -> None:
    with pytest.raises(CogBusyError) as raised:
        events_of(b"HTTP/1.1 " + status + b"\r\nContent-Length: 0\r\n\r\n")
    assert raised.value.__notes__ == ["1"]


def test_what_cog_refuses_is_refused_in_its_words() -> None:
    detail = [{"loc": ["body", "input", "x"], "msg": "no", "type": "value_error"}]
    body = json.dumps({"detail": detail}).encode()
    with pytest.raises(Refused) as raised:
        events_of(
            b"HTTP/1.1 422 Unprocessable Entity\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
        )
    assert raised.value.detail == detail


@pytest.mark.parametrize("status", [b"400 Bad Request", b"413 Payload Too Large"])
def test_what_cog_cannot_read_is_not_asked_for_again(status: bytes) -> None:
    with pytest.raises(Refused) as raised:
        events_of(b"HTTP/1.1 " + status + b"\r\nContent-Length: 7\r\n\r\nno JSON")
    assert raised.value.detail == "no JSON"


@pytest.mark.parametrize("name", ["a/b", "..", "/etc/x", "a\0b", "é" * 200, "a" * 300, "\ud800"])
def test_an_id_that_is_no_folders_name_is_not_shown_to_cog(name: str) -> None:
    asked: list[tuple[str, Any]] = []

    async def check() -> None:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            first, _, body = await read_request(reader)
            asked.append((first.split(" ")[1], body["id"]))
            told = Event("completed", {"id": body["id"], "status": "succeeded"})
            writer.write(HEAD + chunk(told.encode()) + b"0\r\n\r\n")
            writer.close()

        async with asking(serve) as (client, _):
            (event,) = [event async for event in client.predict(name, {})]
            assert event.data["id"] == name

    asyncio.run(check())
    ((path, shown),) = asked
    assert path == f"/predictions/{shown}"
    assert re.fullmatch(r"sha256-[0-9a-f]{64}", shown)


def test_nobody_there_is_a_loss() -> None:
    async def ask() -> None:
        async with new_session() as session:
            client = CogClient(Cog("http://127.0.0.1:1"), session)
            async for _ in client.predict("a", {}):
                pass

    with pytest.raises(CogLostError):
        asyncio.run(ask())


def test_to_stop_reading_closes_the_connection_which_cancels() -> None:
    async def check() -> None:
        closed = asyncio.Event()

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await read_request(reader)
            writer.write(HEAD + chunk(START.encode()))
            assert await reader.read() == b""
            closed.set()

        async with asking(serve) as (client, _), asyncio.timeout(10):
            async with aclosing(client.predict("a", {})) as events:  # type: ignore[type-var]
                assert await anext(events) == START
            await closed.wait()

    asyncio.run(check())


@pytest.mark.parametrize(
    ("told", "metrics"),
    [
        ([{"name": "seed", "value": 7, "mode": "replace"}], {"seed": 7}),
        ([{"name": "timings.wait", "value": 0.5}], {"timings": {"wait": 0.5}}),
        ([{"name": "a", "value": 1}, {"name": "a", "value": 2, "mode": "incr"}], {"a": 3}),
        ([{"name": "a", "value": 1, "mode": "append"}] * 2, {"a": [1, 1]}),
        ([{"name": "a", "value": 1}, {"name": "a", "value": None}], {}),
        ([{"name": "a", "value": 1}, {"name": "a.b", "value": 2}], {"a": {"b": 2}}),
        ([{"name": None, "value": 1}, {"value": 1}, {"name": ""}], {}),
    ],
)
def test_metrics_are_brought_together_as_cog_does(
    told: list[dict[str, Any]], metrics: dict[str, Any]
) -> None:
    known: dict[str, Any] = {}
    for event in told:
        merge_metric(known, event)
    assert known == metrics
