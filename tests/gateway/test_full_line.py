"""A full line: what is recorded is answered all the same, and no trouble with the bucket hides that it is full."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from http import HTTPStatus

import pytest

from demo.s3 import EmbeddedS3
from demo.s3_faults import Fault
from gateway import desk as gateway_desk
from gateway import ledger
from gateway.desk import Desk, Wanted
from gateway.refusals import Refused
from images.prediction import PredictionRecord
from images.records import Claimed
from tests.gateway.test_run import GIVEN, HEAD, START, desk_before
from tests.gateway.watching import TIMEOUT_S, run
from tests.support.records import BlockingRecords

OLD = "predictions/old.json"


@pytest.fixture(autouse=True)
def old(records: BlockingRecords) -> None:
    """A prediction that was made before."""
    record = PredictionRecord.of("old", GIVEN, created_at=datetime.now(UTC))
    claimed = records.claim(record)
    assert isinstance(claimed, Claimed)
    records.finish(claimed, "succeeded", output=["https://images.example/old.png"])


@asynccontextmanager
async def full_desk(s3: EmbeddedS3, bucket: str) -> AsyncIterator[Desk]:
    """One prediction has the slot, and one the place in line, for as long as the block lasts."""

    async def forever(writer: asyncio.StreamWriter) -> None:
        writer.write(HEAD + START)
        await asyncio.Event().wait()

    async with desk_before(s3, bucket, forever) as desk:
        for name in ("runs", "waits"):
            await desk.submit(Wanted(GIVEN, id=name))
        assert desk.line.is_full
        async with asyncio.timeout(TIMEOUT_S):
            yield desk


async def assert_refused(desk: Desk, name: str) -> None:
    with pytest.raises(Refused) as refused:
        await desk.submit(Wanted(GIVEN, id=name))
    assert (refused.value.status, refused.value.reason) == (
        HTTPStatus.TOO_MANY_REQUESTS,
        "queue_full",
    )
    assert int(refused.value.headers["Retry-After"]) > 0


async def assert_answered(desk: Desk) -> None:
    assert (await desk.submit(Wanted(GIVEN, id="old"))).status == "succeeded"


@pytest.mark.parametrize("kind", ["status", "hold"], ids=["refuses", "does not answer"])
def test_a_bucket_that_fails_leaves_it_at_the_full_line(
    s3: EmbeddedS3, bucket: str, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    fault = Fault("hold" if kind == "hold" else "status", bucket=bucket, key=OLD, status=403)

    async def test() -> None:
        async with full_desk(s3, bucket) as desk:
            monkeypatch.setattr(ledger, "ANSWER_WITHIN_S", 0.2)
            with s3.fault(fault):
                await assert_refused(desk, "old")
            monkeypatch.undo()
            await assert_answered(desk)

    run(test)


def test_no_more_than_some_look_at_the_bucket_at_once(
    s3: EmbeddedS3, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gateway_desk, "MOST_LOOKS", 1)

    async def test() -> None:
        async with full_desk(s3, bucket) as desk:
            with s3.fault(Fault("hold", bucket=bucket, key=OLD)):
                looking = asyncio.create_task(assert_answered(desk))
                await asyncio.to_thread(s3.wait_for_held_request)
                await assert_refused(desk, "another")
                await assert_refused(desk, "old")
                assert not looking.done()
            await looking
            await assert_answered(desk)

    run(test)


def test_who_leaves_while_the_bucket_is_looked_at_makes_room_for_another(
    s3: EmbeddedS3, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gateway_desk, "MOST_LOOKS", 1)

    async def test() -> None:
        async with full_desk(s3, bucket) as desk:
            with s3.fault(Fault("hold", bucket=bucket, key=OLD)):
                looking = asyncio.create_task(assert_answered(desk))
                await asyncio.to_thread(s3.wait_for_held_request)
                looking.cancel()
                await asyncio.wait({looking})
            await assert_answered(desk)

    run(test)
