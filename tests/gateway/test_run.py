"""Moments of a prediction that only chance brings about at a whole server: held still in a real desk on a real bucket.

Cog's server is a few lines here, as they say what the real one never would.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any

import httpx
import pytest

from demo.s3 import EmbeddedS3
from demo.s3_faults import Fault
from gateway import desk as gateway_desk
from gateway import recording as gateway_recording
from gateway import run as gateway_run
from gateway.addresses import Guard, GuardedTransport, parse_allowed
from gateway.cog_client import CogClient, new_session
from gateway.cog_status import State, Status
from gateway.desk import Desk, Wanted
from gateway.event_stream import Event
from gateway.ledger import Ledger
from gateway.webhooks import Webhooks
from images.prediction import PredictionRecord, Webhook
from images.records import Claimed, RecordStore
from images.store import ImageStore
from s3.async_client import AsyncClient
from tests.gateway.watching import NEVER_S, TIMEOUT_S, run
from tests.support.receiver import Receiver, receiver
from tests.support.records import BlockingRecords, storage_of

GIVEN: dict[str, Any] = {"prompt": "x"}
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"
START = Event("start", {"status": "processing"}).encode()
LOG = Event("log", {"data": "loading"}).encode()
DONE = Event("completed", {"status": "succeeded", "output": ["a"], "metrics": {}}).encode()

Serve = Callable[[asyncio.StreamWriter], Awaitable[None]]


class Cog:
    """Serves, always."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.status = Status(State.READY, datetime.now(UTC))

    def look(self) -> None:
        pass

    async def wait_for_change(self, seen: Status) -> Status:
        await asyncio.Event().wait()
        return seen


@asynccontextmanager
async def desk_before(
    s3: EmbeddedS3,
    bucket: str,
    serve: Serve,
    *,
    images: ImageStore | None = None,
    keys_may_block: bool = False,
    private_hosts: str = "",
) -> AsyncIterator[Desk]:
    """`serve` answers what is asked for predictions; `images` are the bucket's unless given."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        if head.startswith(b"GET"):
            writer.write(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
        else:
            await serve(writer)
        writer.close()

    listening = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with (
        listening,
        new_session() as session,
        AsyncClient(storage_of(s3)) as client,
        httpx.AsyncClient(
            transport=GuardedTransport(Guard(parse_allowed(private_hosts))), trust_env=False
        ) as theirs,
    ):
        cog = Cog(f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}")
        ledger = Ledger(
            RecordStore(client, bucket),
            images or ImageStore(s3.client(), bucket),
            keys_may_block=keys_may_block,
        )
        desk = Desk(
            cog,
            CogClient(cog, session),
            ledger,
            Webhooks(theirs),
            slots=1,
            queue_size=1,
            prediction_seconds=60.0,
        )
        try:
            yield desk
        finally:
            await desk.close(0.0)
            ledger.close()


async def until(holds: Callable[[], Any]) -> None:
    async with asyncio.timeout(TIMEOUT_S):
        while not await asyncio.to_thread(holds):  # noqa: ASYNC110 - a bucket tells nobody of its changes
            await asyncio.sleep(0.02)


def record_of(records: BlockingRecords, name: str) -> PredictionRecord:
    stored = records.get(name)
    assert stored is not None
    return stored.record


def test_what_the_gateway_fails_at_is_recorded_as_its_callers_are_told(
    s3: EmbeddedS3, bucket: str, records: BlockingRecords
) -> None:
    async def nonsense(writer: asyncio.StreamWriter) -> None:
        deep = "[" * 100_000 + "]" * 100_000  # no program reads that
        writer.write(HEAD + START + f"event: metric\ndata: {deep}\n\n".encode())
        await writer.drain()

    async def test() -> None:
        async with desk_before(s3, bucket, nonsense) as desk:
            prediction = await desk.submit(Wanted(GIVEN, id="odd"))
            with desk.watching(prediction):
                await prediction.ended()
            assert prediction.status == "failed"
            record = record_of(records, "odd")
            assert (record.status, record.error) == ("failed", prediction.error)
            assert desk.running == 0

    run(test)


async def told_by(desk: Desk, name: str) -> list[dict[str, Any]]:
    """To those who look at it, and to those who look at the list."""
    answer = await desk.get(name)
    listed, _ = await desk.recent(10, None)
    return [*([answer] if answer else []), *listed]


class Held:
    """A runner that has told of an output, and whose end the bucket does not take until `s3.clear_faults`."""

    def __init__(self, s3: EmbeddedS3, bucket: str, records: BlockingRecords, done: bytes) -> None:
        self._s3 = s3
        self._fault = Fault("hold", method="PUT", bucket=bucket, key=records.key("kept"), times=1)
        self._done = done
        self._ends = asyncio.Event()

    async def serve(self, writer: asyncio.StreamWriter) -> None:
        chunk = Event("output", {"chunk": "a", "index": 0}).encode()
        writer.write(HEAD + START + chunk + LOG)
        await self._ends.wait()
        writer.write(self._done)

    async def end(self) -> None:
        """Returns while the record is on its way."""
        self._s3.inject(self._fault)
        self._ends.set()
        await asyncio.to_thread(self._s3.wait_for_held_request)


@pytest.mark.parametrize(
    "end",
    [
        {"status": "succeeded", "output": ["a"], "metrics": {"predict_time": 1.5}, "logs": "all"},
        {"status": "failed", "error": "no"},
    ],
    ids=["succeeded", "failed"],
)
def test_nobody_is_told_of_an_end_that_is_not_recorded(
    s3: EmbeddedS3, bucket: str, records: BlockingRecords, end: dict[str, Any]
) -> None:
    async def test() -> None:
        held = Held(s3, bucket, records, Event("completed", end).encode())
        async with desk_before(s3, bucket, held.serve) as desk:
            prediction = await desk.submit(Wanted(GIVEN, id="kept", background=True))
            await until(lambda: prediction.logs)
            under_way = await told_by(desk, "kept")
            try:
                await held.end()
                assert not record_of(records, "kept").finished
                assert await told_by(desk, "kept") == under_way
            finally:
                s3.clear_faults()
            await prediction.ended()
            told = await told_by(desk, "kept")
        assert [answer["status"] for answer in told] == [end["status"]] * 2
        assert [answer["status"] for answer in under_way] == ["processing"] * 2
        assert [answer["output"] for answer in under_way] == [["a"]] * 2
        assert record_of(records, "kept").status == end["status"]

    run(test)


def test_an_end_that_another_replica_forestalls_is_told_to_nobody(
    s3: EmbeddedS3, bucket: str, records: BlockingRecords
) -> None:
    async def test() -> None:
        held = Held(s3, bucket, records, DONE)
        async with desk_before(s3, bucket, held.serve) as desk:
            prediction = await desk.submit(Wanted(GIVEN, id="kept", background=True))
            try:
                await held.end()
                theirs = record_of(records, "kept").changed(owner="other", claim="theirs")
                s3.client().put_object(Bucket=bucket, Key=records.key("kept"), Body=theirs.dump())
            finally:
                s3.clear_faults()
            await prediction.ended()
            told = await told_by(desk, "kept")
            assert {answer["status"] for answer in told} == {theirs.status}
            assert prediction.refusal is not None
            assert "another server" in str(prediction.refusal)
            events = [event.name async for event in prediction.events()]
            assert "completed" not in events

    run(test)


def test_an_end_that_is_not_recorded_before_the_server_s_is_told_to_nobody(
    s3: EmbeddedS3, bucket: str, records: BlockingRecords, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gateway_desk, "LAST_WEBHOOKS_S", 0.1)

    async def test() -> None:
        held = Held(s3, bucket, records, DONE)
        async with desk_before(s3, bucket, held.serve) as desk:
            prediction = await desk.submit(Wanted(GIVEN, id="kept"))
            with desk.watching(prediction):
                try:
                    await held.end()
                    await desk.close(0.1)
                    await prediction.ended()
                finally:
                    s3.clear_faults()
            assert prediction.refusal is not None
            assert "ask again" in str(prediction.refusal)
            assert "completed" not in [event.name async for event in prediction.events()]

    run(test)


@pytest.mark.parametrize("bucket_recovers", [True, False])
def test_a_result_that_the_bucket_does_not_take_in_time_is_told_once_it_does(
    s3: EmbeddedS3,
    bucket: str,
    records: BlockingRecords,
    monkeypatch: pytest.MonkeyPatch,
    bucket_recovers: bool,
) -> None:
    monkeypatch.setattr(gateway_recording, "PAUSES_S", (0.0, 0.0))
    later = (0.05,) * 1000 if bucket_recovers else (0.0, 0.05)
    monkeypatch.setattr(gateway_recording, "LATER_PAUSES_S", later)
    begin = asyncio.Event()

    async def once_told(writer: asyncio.StreamWriter) -> None:
        await begin.wait()
        writer.write(HEAD + START + DONE)

    async def test(hooks: Receiver) -> None:
        async with desk_before(s3, bucket, once_told, private_hosts="127.0.0.1") as desk:
            webhook = Webhook(url=hooks.url, events_filter=["completed"])
            wanted = Wanted(GIVEN, id="kept", webhook=webhook, background=True)
            prediction = await desk.submit(wanted)
            s3.inject(
                Fault("status", method="PUT", bucket=bucket, key=records.key("kept"), status=403)
            )
            begin.set()
            try:
                await prediction.ended()
                assert prediction.answer()["status"] == "succeeded"
                assert desk.has("kept")  # the sweep is not to make it anew
                if not bucket_recovers:
                    await until(lambda: not desk.has("kept"))
                assert not record_of(records, "kept").finished
                assert hooks.messages == []
            finally:
                s3.clear_faults()
            if bucket_recovers:
                await until(lambda: hooks.messages)
                assert record_of(records, "kept").status == "succeeded"
                (message,) = hooks.messages
                assert message.answer["output"] == ["a"]
                await until(lambda: not desk.has("kept"))

    with receiver() as hooks:
        run(lambda: test(hooks))


def test_a_prediction_that_is_cancelled_before_it_is_known_whose_it_is_is_cancelled_there(
    s3: EmbeddedS3, bucket: str, records: BlockingRecords
) -> None:
    async def never(writer: asyncio.StreamWriter) -> None:
        raise AssertionError("it is another's")

    async def test() -> None:
        theirs = PredictionRecord.of("theirs", GIVEN, created_at=datetime.now(UTC))
        claimed = records.claim(theirs, 60.0)
        assert isinstance(claimed, Claimed)
        async with desk_before(s3, bucket, never) as desk:
            await desk.ledger.get("theirs")
            s3.inject(
                Fault("hold", method="GET", bucket=bucket, key="predictions/theirs*", times=1)
            )
            submitting = asyncio.create_task(desk.submit(Wanted(GIVEN, id="theirs")))
            try:
                await asyncio.to_thread(s3.wait_for_held_request)
                assert await desk.cancel("theirs")
            finally:
                s3.clear_faults()
            prediction = await submitting
            await until(lambda: record_of(records, "theirs").cancel_requested)
            records.finish(claimed, "canceled")
            with desk.watching(prediction):
                await prediction.ended()
            assert prediction.status == "canceled"

    run(test)


def test_a_server_that_stops_does_not_wait_for_what_it_has_not_begun_to_follow(
    s3: EmbeddedS3, bucket: str, records: BlockingRecords
) -> None:
    async def never(writer: asyncio.StreamWriter) -> None:
        raise AssertionError("it is another's")

    async def test() -> None:
        theirs = PredictionRecord.of("theirs", GIVEN, created_at=datetime.now(UTC))
        records.claim(theirs, 60.0)
        async with desk_before(s3, bucket, never) as desk:
            s3.inject(
                Fault("hold", method="GET", bucket=bucket, key="predictions/theirs*", times=1)
            )
            submitting = asyncio.create_task(desk.submit(Wanted(GIVEN, id="theirs")))
            try:
                await asyncio.to_thread(s3.wait_for_held_request)
                closing = asyncio.create_task(desk.close(TIMEOUT_S))
                await asyncio.sleep(0)
            finally:
                s3.clear_faults()
            async with asyncio.timeout(TIMEOUT_S / 2):
                await closing
            assert (await submitting).completed_at is None

    run(test)


def test_who_wants_it_in_the_background_gets_that_though_another_asked_first(
    s3: EmbeddedS3, bucket: str, records: BlockingRecords
) -> None:
    begun = asyncio.Event()

    async def forever(writer: asyncio.StreamWriter) -> None:
        writer.write(HEAD + START)
        await writer.drain()
        begun.set()
        await asyncio.Event().wait()

    async def test() -> None:
        async with desk_before(s3, bucket, forever) as desk:
            first = await desk.submit(Wanted(GIVEN, id="shared"))
            with desk.watching(first):
                await begun.wait()
                second = await desk.submit(Wanted(GIVEN, id="shared", background=True))
                assert second is first
                await desk.close(0.0)
            stored = records.get("shared")
            assert stored is not None
            assert stored.abandoned
            assert stored.record.background

    run(test)


@pytest.mark.parametrize(
    ("within_s", "told"),
    [(0.05, START), (NEVER_S, START + LOG)],
    ids=["that tells nothing for long", "that tells of itself"],
)
def test_a_prediction_is_in_the_list_while_it_is_made(
    s3: EmbeddedS3,
    bucket: str,
    records: BlockingRecords,
    monkeypatch: pytest.MonkeyPatch,
    within_s: float,
    told: bytes,
) -> None:
    monkeypatch.setattr(gateway_run, "ENTER_WITHIN_S", within_s)

    async def test() -> None:
        is_listed = asyncio.Event()

        async def held(writer: asyncio.StreamWriter) -> None:
            writer.write(HEAD + told)
            await is_listed.wait()
            writer.write(DONE)

        async with desk_before(s3, bucket, held) as desk:
            prediction = await desk.submit(Wanted(GIVEN, id="listed"))
            with desk.watching(prediction):
                await until(lambda: records.recent(10).stored)
                assert not prediction.finished
                is_listed.set()
                await prediction.ended()
            assert prediction.status == "succeeded"
            (stored,) = (await desk.ledger.recent(10, None)).stored
            assert stored.record.id == "listed"

    run(test)
