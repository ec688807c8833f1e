"""The list of predictions: newest first, page by page, with what a crash left."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import TYPE_CHECKING

import pytest

from demo.s3 import EmbeddedS3, Fault
from images.errors import RecordError
from images.records import Claimed, RecordStore
from s3.async_client import AsyncClient
from settings import StorageSettings
from tests.images.claims import NOON, claim, write
from tests.support.records import BlockingRecords

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client


def test_the_newest_come_first_page_by_page(store: BlockingRecords) -> None:
    ids = [f"p{number}" for number in range(7)] + ["a/b"]
    for number, prediction_id in enumerate(ids):
        moment = NOON + timedelta(milliseconds=number)
        store.enter(claim(store, prediction_id, created_at=moment).record)

    pages = [store.recent(3)]
    while pages[-1].before:
        pages.append(store.recent(3, pages[-1].before))

    listed = [[stored.record.id for stored in page.stored] for page in pages]
    assert listed == [["a/b", "p6", "p5"], ["p4", "p3", "p2"], ["p1", "p0"]]


def test_what_came_since_the_first_page_does_not_move_the_next(store: BlockingRecords) -> None:
    for number in range(4):
        moment = NOON + timedelta(seconds=number)
        store.enter(claim(store, f"p{number}", created_at=moment).record)
    first = store.recent(2)
    store.enter(claim(store, "newer", created_at=NOON + timedelta(hours=1)).record)

    second = store.recent(2, first.before)

    assert [stored.record.id for stored in second.stored] == ["p1", "p0"]


def test_what_is_taken_over_is_in_the_list_all_the_time(
    s3: EmbeddedS3, bucket: str, store: BlockingRecords, other: BlockingRecords
) -> None:
    store.enter(claim(store, "dead", lease_seconds=0).record)

    def listed() -> list[str]:
        return [stored.record.owner for stored in store.recent(10).stored]

    with (
        s3.fault(Fault("status", method="PUT", bucket=bucket, key="*/by-time/*", status=403)),
        pytest.raises(RecordError),
    ):
        claim(other, "dead", created_at=NOON + timedelta(hours=1))
    assert listed() == [store.owner]

    claim(other, "dead", created_at=NOON + timedelta(hours=1))
    assert listed() == [other.owner]


def test_a_page_costs_one_listing_and_one_read_for_each_on_it(
    s3: EmbeddedS3, bucket: str, store: BlockingRecords
) -> None:
    for number in range(5):
        moment = NOON + timedelta(seconds=number)
        store.enter(claim(store, f"p{number}", created_at=moment).record)
    before = len(s3.requests(bucket))

    store.recent(3)

    made = s3.requests(bucket)[before:]
    assert sorted(record.key for record in made) == ["", *(f"predictions/p{n}.json" for n in "234")]


def test_what_a_crash_left_unfinished_is_listed_as_abandoned(
    store: BlockingRecords, other: BlockingRecords
) -> None:
    for prediction_id, lease_seconds in (("alive", 60.0), ("dead", 0.0), ("done", 0.0)):
        claimed = claim(store, prediction_id, lease_seconds=lease_seconds)
        store.enter(claimed.record)
    store.finish(claimed, "succeeded")

    (dead,) = [stored for stored in other.recent(10).stored if stored.abandoned]
    retaken = other.claim(dead.record)

    assert isinstance(retaken, Claimed)
    assert (retaken.record.id, retaken.record.attempts) == ("dead", 2)
    assert not [stored for stored in store.recent(10).stored if stored.abandoned]


def test_one_damaged_record_does_not_hide_the_others(
    client: S3Client, bucket: str, store: BlockingRecords, caplog: pytest.LogCaptureFixture
) -> None:
    for prediction_id in ("a-cat", "a-dog", "gone"):
        store.enter(claim(store, prediction_id).record)
    write(client, bucket, b"{")
    client.delete_object(Bucket=bucket, Key="predictions/gone.json")

    page = store.recent(10)

    assert [stored.record.id for stored in page.stored] == ["a-dog"]
    assert f"s3://{bucket}/predictions/a-cat.json" in caplog.text


def test_one_read_that_fails_ends_the_others(
    s3: EmbeddedS3, bucket: str, storage: StorageSettings, store: BlockingRecords
) -> None:
    """Of twenty, eight are read at once: the newest is refused while the server holds the seven after it."""
    for number in range(20):
        moment = NOON - timedelta(seconds=number)
        store.enter(claim(store, f"p{number}", created_at=moment).record)
    before = len(s3.requests(bucket))

    async def ask() -> None:
        async with AsyncClient(storage) as client:
            with pytest.raises(RecordError, match=r"cannot read s3://.*/predictions/p0\.json: "):
                await RecordStore(client, bucket).recent(20)
            s3.clear_faults()
            left = asyncio.all_tasks() - {asyncio.current_task()}
            await asyncio.gather(*left, return_exceptions=True)

    with s3.fault(Fault("status", bucket=bucket, key="predictions/p0.json", status=403)):
        s3.inject(Fault("hold", bucket=bucket, key="predictions/p*.json"))
        asyncio.run(ask())

    read = {record.key for record in s3.requests(bucket)[before:] if record.method == "GET"}
    assert read - {""} <= {f"predictions/p{number}.json" for number in range(8)}


@pytest.mark.parametrize("before", ["", "../x", "1-a", "0000000000000-", "0000000000000-a/b"])
def test_a_place_in_the_list_that_no_page_gave_is_refused(
    store: BlockingRecords, before: str
) -> None:
    with pytest.raises(RecordError, match="is no place in the list"):
        store.recent(5, before)
