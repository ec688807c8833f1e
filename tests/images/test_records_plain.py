"""Records at servers that lose answers, meet other writes, or know no conditions."""

from __future__ import annotations

import asyncio
import threading
from datetime import timedelta
from typing import Any

import pytest

from images.errors import LostLeaseError, RecordError
from images.prediction import PredictionRecord, Webhook
from images.records import Claimed, RecordStore
from s3.async_client import AsyncClient
from tests.images.claims import NOON, all_claim, asked, claim, existing, got
from tests.images.plain_s3 import TIMEOUT_S, PlainS3
from tests.support.records import BlockingRecords


def test_a_write_that_meets_another_under_way_is_tried_again(plain: PlainS3) -> None:
    store = BlockingRecords(plain.storage, "pictures")
    plain.conflict = 2

    claimed = claim(store)
    plain.conflict = 2
    store.finish(claimed, "succeeded")

    assert got(store).record.status == "succeeded"


def test_a_conflict_that_stays_is_a_clear_error(plain: PlainS3) -> None:
    store = BlockingRecords(plain.storage, "pictures")
    claim(store, "the first tries the server")
    plain.conflict = 1000

    with pytest.raises(RecordError, match=r"cannot write s3://pictures/predictions/a-cat\.json: "):
        store.claim(asked())


def test_a_claim_whose_answer_was_lost_is_still_a_claim(plain: PlainS3) -> None:
    store = BlockingRecords(plain.storage, "pictures")
    claim(store, "the first tries the server")

    plain.lose = 1
    claimed = claim(store)
    plain.lose = 1
    renewed = store.renew(claimed, status="processing")
    plain.lose = 1
    finished = store.finish(renewed, "succeeded", output=["x"])

    assert got(store).record == finished


def test_a_takeover_whose_answer_was_lost_is_still_a_takeover(plain: PlainS3) -> None:
    store, other = (BlockingRecords(plain.storage, "pictures") for _ in range(2))
    claim(store, lease_seconds=0)
    claim(other, "the first tries the server")

    plain.lose = 1
    taken = claim(other)

    assert (taken.record.owner, taken.record.attempts) == (other.owner, 2)
    assert got(store).record == taken.record


def test_word_to_cancel_whose_answer_was_lost_is_left(plain: PlainS3) -> None:
    store = BlockingRecords(plain.storage, "pictures")
    claimed = claim(store)

    plain.lose = 1
    assert store.ask_to_cancel("a-cat")

    assert got(store).record == claimed.record.changed(cancel_requested=True)


def test_a_note_of_a_webhook_whose_answer_was_lost_is_made_once(plain: PlainS3) -> None:
    store = BlockingRecords(plain.storage, "pictures")
    claimed = claim(store, webhook=Webhook(url="https://me/1"))
    finished = store.finish(claimed, "succeeded", completed_at=NOON)

    plain.lose = 1
    store.note_webhook("a-cat", NOON, sent_at=NOON)

    assert got(store).record == finished.changed(webhook=Webhook(url="https://me/1", sent_at=NOON))


END: dict[str, Any] = {"output": ["x"], "metrics": {"seconds": 1.5}, "completed_at": NOON}


def finish_again(plain: PlainS3, *, unwanted: bool = False, **end: Any) -> PredictionRecord:
    """What comes of finishing with `end` where END was stored, and its caller gone before the answer came."""

    async def run() -> PredictionRecord:
        async with AsyncClient(plain.storage) as client:
            store, other = (RecordStore(client, "pictures") for _ in range(2))
            claimed = await store.claim(asked())
            assert isinstance(claimed, Claimed)
            if unwanted:  # by another
                await other.ask_to_cancel("a-cat")
            plain.keep = 1
            finishing = asyncio.create_task(store.finish(claimed, "succeeded", **END))
            await asyncio.to_thread(plain.kept.wait, TIMEOUT_S)
            finishing.cancel()
            with pytest.raises(asyncio.CancelledError):
                await finishing
            return await store.finish(claimed, "succeeded", **end)

    return asyncio.run(run())


@pytest.mark.parametrize("unwanted", [False, True])
def test_an_end_that_was_given_up_once_stored_may_be_recorded_again(
    plain: PlainS3, unwanted: bool
) -> None:
    record = finish_again(plain, unwanted=unwanted, **END)

    assert (record.output, record.completed_at, record.cancel_requested) == (["x"], NOON, unwanted)
    assert record == got(BlockingRecords(plain.storage, "pictures")).record


@pytest.mark.parametrize("changed", [{"output": ["y"]}, {"completed_at": NOON + timedelta(1)}])
def test_an_end_that_was_given_up_once_stored_is_not_recorded_otherwise(
    plain: PlainS3, changed: dict[str, Any]
) -> None:
    with pytest.raises(LostLeaseError, match=r"is finished already \(succeeded\)"):
        finish_again(plain, **{**END, **changed})

    assert got(BlockingRecords(plain.storage, "pictures")).record.output == ["x"]


@pytest.mark.parametrize("ignored", [(), ("If-None-Match", "If-Match"), ("If-Match",)])
def test_without_conditional_writes_looking_before_and_after_does_and_is_said_once(
    plain: PlainS3, caplog: pytest.LogCaptureFixture, ignored: tuple[str, ...]
) -> None:
    plain.conditional_writes, plain.ignored = bool(ignored), ignored  # or they are refused
    store, other = (BlockingRecords(plain.storage, "pictures") for _ in range(2))

    lost = claim(store, lease_seconds=0)
    won = claim(other)
    with pytest.raises(LostLeaseError, match="took it over"):
        store.finish(lost, "succeeded", output=["of the loser"])
    other.finish(won, "succeeded", output=["of the winner"])

    assert existing(store).stored.record.output == ["of the winner"]
    warnings = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert [message.count("no conditional writes") for message in warnings] == [1, 1]  # one a store


def test_without_conditional_writes_who_was_overwritten_at_once_does_not_have_it(
    plain: PlainS3,
) -> None:
    plain.conditional_writes = False
    store, other = (BlockingRecords(plain.storage, "pictures") for _ in range(2))
    together = threading.Barrier(2)
    store_write = plain.put

    def put(key: str, body: bytes, headers: object) -> str | None:
        code = store_write(key, body, headers)
        if key.endswith("a-cat.json"):
            together.wait(30)  # both have looked, and both have written, before either looks again
        return code

    plain.put = put  # type: ignore[method-assign]
    results = all_claim([store, other])

    assert [isinstance(result, Claimed) for result in results].count(True) == 1
