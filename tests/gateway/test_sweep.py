"""What other gateways left, looked after by a real sweep on a real bucket. Cog's server is off: nothing is made."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest

from demo.s3 import EmbeddedS3
from gateway import sweep
from gateway.addresses import Guard, GuardedTransport, parse_allowed
from gateway.cog_client import CogClient, new_session
from gateway.cog_process import CogProcess
from gateway.desk import Desk
from gateway.ledger import Ledger
from gateway.sweep import Sweep
from gateway.webhooks import Webhooks
from images.prediction import PredictionRecord, Webhook
from images.records import Claimed, RecordStore
from images.store import ImageStore
from s3.async_client import AsyncClient
from tests.gateway.watching import TIMEOUT_S, run
from tests.support.receiver import Receiver, receiver
from tests.support.records import BlockingRecords, storage_of


@asynccontextmanager
async def sweeping(s3: EmbeddedS3, bucket: str) -> AsyncIterator[Desk]:
    guard = Guard(parse_allowed("127.0.0.1"))
    async with (
        new_session() as session,
        AsyncClient(storage_of(s3)) as bucket_client,
        httpx.AsyncClient(transport=GuardedTransport(guard), trust_env=False) as theirs,
    ):
        cog = CogProcess(session)
        ledger = Ledger(
            RecordStore(bucket_client, bucket), ImageStore(s3.client(), bucket, "", 3600, None)
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
        task = asyncio.create_task(Sweep(desk, every_s=0.05, webhook_left_s=0.0).run())
        try:
            yield desk
            assert not task.done()
        finally:
            task.cancel()
            await desk.close(0.0)


def left(
    records: BlockingRecords,
    name: str,
    *,
    lease_seconds: float = 60.0,
    claims: int = 1,
    **fields: Any,
) -> Claimed:
    record = PredictionRecord.of(name, {"prompt": name}, created_at=datetime.now(UTC), **fields)
    for claim in reversed(range(claims)):
        claimed = records.claim(record, lease_seconds if claim == 0 else 0.0)
        assert isinstance(claimed, Claimed)
    records.enter(record)
    return claimed


def ended(records: BlockingRecords, name: str, output: Any = None, **fields: Any) -> None:
    records.finish(left(records, name, **fields), "succeeded", output=output)


def told(receiving: Receiver) -> list[str]:
    return [message.answer["id"] for message in receiving.messages]


async def until(holds: Callable[[], Any]) -> None:
    async with asyncio.timeout(TIMEOUT_S):
        while not await asyncio.to_thread(holds):  # noqa: ASYNC110 - a bucket tells nobody of its changes
            await asyncio.sleep(0.02)


def test_who_wants_to_hear_no_more_is_not_told_at_every_look(
    s3: EmbeddedS3, bucket: str, records: BlockingRecords
) -> None:
    async def test() -> None:
        with receiver() as gone, receiver() as later:
            gone.statuses = [410]
            ended(records, "gone", webhook=Webhook(url=gone.url))
            async with sweeping(s3, bucket):
                await until(lambda: told(gone))
                ended(records, "later", webhook=Webhook(url=later.url))
                await until(lambda: told(later))
                # Several looks have come and gone by the time a third one is told.
                ended(records, "last", webhook=Webhook(url=later.url))
                await until(lambda: len(told(later)) > 1)
            assert told(gone) == ["gone"]
            assert told(later) == ["later", "last"]
            # Nor by a gateway that comes after.
            assert _record(records, "gone").settled
            async with sweeping(s3, bucket):
                ended(records, "newest", webhook=Webhook(url=later.url))
                await until(lambda: len(told(later)) > 2)
            assert told(gone) == ["gone"]

    run(test)


def test_who_is_being_told_by_another_is_left_to_it_until_it_falls_silent(
    s3: EmbeddedS3, bucket: str, records: BlockingRecords
) -> None:
    async def test() -> None:
        with receiver() as receiving:
            for name, seconds in (("told-by-another", 3600), ("left-by-another", -1)):
                ended(records, name, webhook=Webhook(url=receiving.url))
                until_then = datetime.now(UTC) + timedelta(seconds=seconds)
                end = _record(records, name).completed_at
                records.note_webhook(name, end, tried_until=until_then)
            async with sweeping(s3, bucket):
                await until(lambda: told(receiving))
                await looked_again(s3, bucket)
            assert told(receiving) == ["left-by-another"]

    run(test)


def test_what_is_left_is_found_again_behind_all_that_came_after_it(
    s3: EmbeddedS3, bucket: str, records: BlockingRecords, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep, "PAGE", 2)

    async def test() -> None:
        # Its gateway may live, as far as the first looks can tell; then it has been tried often enough.
        left(records, "old", lease_seconds=2.0, claims=sweep.MOST_ATTEMPTS, background=True)
        for number in range(6):
            ended(records, f"newer-{number}")
        async with sweeping(s3, bucket):
            await until(lambda: _record(records, "old").finished)
        assert _record(records, "old").status == "failed"

    run(test)


def test_one_that_cannot_be_looked_after_holds_up_no_other(
    s3: EmbeddedS3, bucket: str, records: BlockingRecords, caplog: pytest.LogCaptureFixture
) -> None:
    async def test() -> None:
        for name in ("well", "ill"):
            left(records, name, lease_seconds=0.0, claims=sweep.MOST_ATTEMPTS, background=True)
        async with sweeping(s3, bucket) as desk:
            has = desk.has

            def fail(prediction_id: str) -> bool:
                if prediction_id == "ill":
                    raise ZeroDivisionError
                return has(prediction_id)

            desk.has = fail  # type: ignore[method-assign]
            await until(lambda: _record(records, "well").finished)
        assert not _record(records, "ill").finished

    run(test)
    assert "prediction ill is left as it is" in caplog.text


def test_what_is_settled_is_read_once_at_most_however_often_the_sweep_looks(
    s3: EmbeddedS3, bucket: str, records: BlockingRecords
) -> None:
    async def test() -> None:
        with receiver() as receiving:
            ended(records, "by-another")
            async with sweeping(s3, bucket) as desk:
                mine = PredictionRecord.of("mine", {}, created_at=datetime.now(UTC))
                claimed = await desk.ledger.claim(mine)
                assert isinstance(claimed, Claimed)
                await desk.ledger.finish(claimed, "succeeded")
                await desk.ledger.enter(mine)
                ended(records, "to-be-told", webhook=Webhook(url=receiving.url))
                await until(lambda: told(receiving))
                await until(lambda: _record(records, "to-be-told").settled)
                await looked_again(s3, bucket)
                before = reads(s3, records, "to-be-told")
                await looked_again(s3, bucket)
                assert reads(s3, records, "to-be-told") == before
                assert reads(s3, records, "by-another") == 1
                assert reads(s3, records, "mine") == 0

    run(test)


def test_once_nothing_is_left_the_newest_are_looked_at_alone(
    s3: EmbeddedS3, bucket: str, records: BlockingRecords, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep, "PAGE", 2)
    monkeypatch.setattr(sweep, "ENTERED_LATE", timedelta(0))

    async def test() -> None:
        for number in range(6):
            ended(records, f"{number}")
        async with sweeping(s3, bucket):
            await until(lambda: lists(s3, bucket, further=True) >= 2)
            await looked_again(s3, bucket)
            before = lists(s3, bucket, further=True)
            await looked_again(s3, bucket)
            assert lists(s3, bucket, further=True) == before

    run(test)


async def looked_again(s3: EmbeddedS3, bucket: str) -> None:
    """Until some looks have begun and ended since."""
    seen = lists(s3, bucket, further=False)
    await until(lambda: lists(s3, bucket, further=False) > seen + 5)


def lists(s3: EmbeddedS3, bucket: str, *, further: bool) -> int:
    """How many pages were asked for: first ones, of which each look begins with one, or `further` ones."""
    return sum(
        "list-type" in request.query and ("start-after" in request.query) is further
        for request in s3.requests(bucket)
    )


def reads(s3: EmbeddedS3, records: BlockingRecords, name: str) -> int:
    key = records.key(name)
    return sum((request.method, request.key) == ("GET", key) for request in s3.requests())


def _record(records: BlockingRecords, name: str) -> PredictionRecord:
    stored = records.get(name)
    assert stored is not None
    return stored.record
