"""Who has a prediction: claims, leases and results, against the embedded S3 server."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest

from demo.s3 import EmbeddedS3, Fault
from images.errors import ImagesError, LostLeaseError, RecordError
from images.prediction import Webhook
from images.records import Claimed, Existing
from settings import StorageSettings
from tests.images.claims import CAT, NOON, all_claim, asked, claim, existing, got
from tests.support.records import BlockingRecords, storage_of

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client


def test_who_claims_first_has_it_and_everybody_else_sees_that(
    store: BlockingRecords, other: BlockingRecords
) -> None:
    claimed = claim(store)

    found = existing(other)

    assert found.same_input
    assert found.stored.record == claimed.record
    assert not found.stored.abandoned
    assert (claimed.record.owner, claimed.record.attempts) == (store.owner, 1)


def test_one_of_many_that_claim_at_once_has_it(storage: StorageSettings, bucket: str) -> None:
    results = all_claim([BlockingRecords(storage, bucket) for _ in range(16)])

    (winner,) = [result for result in results if isinstance(result, Claimed)]
    seen = [result.stored.record for result in results if isinstance(result, Existing)]
    assert seen == [winner.record] * 15


def test_one_replica_asked_twice_at_once_generates_once(store: BlockingRecords) -> None:
    results = all_claim(8 * [store])

    assert [isinstance(result, Claimed) for result in results].count(True) == 1


def test_what_is_finished_is_returned_for_ever(
    store: BlockingRecords, other: BlockingRecords
) -> None:
    claimed = claim(store, lease_seconds=0)
    later = NOON + timedelta(seconds=3)

    store.finish(claimed, "succeeded", output=["x"], metrics={"seconds": 1.5}, completed_at=later)

    record = existing(other).stored.record
    assert (record.status, record.output) == ("succeeded", ["x"])
    assert (record.metrics, record.completed_at) == ({"seconds": 1.5}, later)
    assert got(other).record == record
    assert not got(other).abandoned
    assert isinstance(other.claim(record), Existing)


def test_a_result_is_never_changed_not_even_by_its_own_replica(store: BlockingRecords) -> None:
    claimed = claim(store)
    store.finish(claimed, "canceled")

    for late in (
        lambda: store.finish(claimed, "succeeded", output=["late"]),
        lambda: store.renew(claimed),
    ):
        with pytest.raises(LostLeaseError, match=r"predictions/a-cat.json is finished already \(c"):
            late()

    assert got(store).record.status == "canceled"


def test_one_of_many_takes_over_what_a_dead_replica_left(
    store: BlockingRecords, storage: StorageSettings, bucket: str
) -> None:
    claim(store, lease_seconds=0)
    stores = [BlockingRecords(storage, bucket) for _ in range(16)]

    results = all_claim(stores, created_at=NOON + timedelta(hours=1))

    (winner,) = [result for result in results if isinstance(result, Claimed)]
    assert (winner.record.attempts, winner.record.reruns) == (2, 0)
    assert winner.record.created_at == NOON + timedelta(hours=1)  # where the list has it
    assert got(store).record == winner.record
    assert not got(store).abandoned


def test_who_lost_the_lease_cannot_record_a_result(
    store: BlockingRecords, other: BlockingRecords
) -> None:
    lost = claim(store, lease_seconds=0)
    won = claim(other)

    for attempt in (
        lambda: store.renew(lost),
        lambda: store.finish(lost, "succeeded", output=["of the loser"]),
    ):
        with pytest.raises(LostLeaseError, match=f"{other.owner} took it over"):
            attempt()

    other.finish(won, "succeeded", output=["of the winner"])
    assert got(store).record.output == ["of the winner"]


def test_a_late_owner_nobody_replaced_still_finishes(store: BlockingRecords) -> None:
    claimed = claim(store, lease_seconds=0)
    assert got(store).abandoned

    store.finish(claimed, "succeeded")

    assert got(store).record.status == "succeeded"


def test_renewing_begins_the_lease_anew_and_notes_how_far_it_is(store: BlockingRecords) -> None:
    claimed = claim(store, lease_seconds=0)

    renewed = store.renew(claimed, 60, status="processing", started_at=NOON)

    assert got(store).record == renewed.record
    assert (renewed.record.status, renewed.record.started_at) == ("processing", NOON)
    assert not got(store).abandoned


@contextmanager
def under_way(s3: EmbeddedS3, bucket: str, call: Callable[[], Any]) -> Iterator[Future[Any]]:
    """What `call` comes to, whose first write the server keeps back for as long as the block lasts."""
    hold = Fault("hold", bucket=bucket, method="PUT", times=1)
    with ThreadPoolExecutor(1) as pool, s3.fault(hold):
        called = pool.submit(call)
        s3.wait_for_held_request()
        yield called


def test_an_end_outlasts_a_renewal_that_was_written_while_it_was_under_way(
    s3: EmbeddedS3, bucket: str, store: BlockingRecords
) -> None:
    claimed = claim(store)

    with under_way(s3, bucket, lambda: store.finish(claimed, "succeeded", output=["x"])) as end:
        store.renew(claimed, status="processing", started_at=NOON)

    assert got(store).record == end.result()
    assert (end.result().status, end.result().output) == ("succeeded", ["x"])


def test_a_renewal_that_is_under_way_does_not_undo_the_end(
    s3: EmbeddedS3, bucket: str, store: BlockingRecords
) -> None:
    claimed = claim(store)

    with under_way(s3, bucket, lambda: store.renew(claimed, status="processing")) as renewal:
        finished = store.finish(claimed, "succeeded", output=["x"])

    assert isinstance(renewal.exception(), LostLeaseError)
    assert got(store).record == finished


def test_the_lease_goes_by_the_buckets_clock(
    store: BlockingRecords, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Ahead(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:
            return datetime.now(tz) + timedelta(days=1)

    claim(store)
    monkeypatch.setattr("images.conditional.datetime", Ahead)

    assert got(store).age < 60
    assert isinstance(store.claim(asked()), Existing)


def test_the_same_id_with_another_input_is_recognised_and_never_taken_over(
    store: BlockingRecords, other: BlockingRecords
) -> None:
    claim(store, lease_seconds=0)

    found = existing(other, "a-cat", {"prompt": "a dog"})

    assert not found.same_input
    assert found.stored.abandoned
    assert found.stored.record.input == CAT


def test_a_webhook_is_due_from_the_end_until_it_was_sent(
    store: BlockingRecords, other: BlockingRecords
) -> None:
    claimed = claim(store, webhook=Webhook(url="https://me/1"))
    store.note_webhook("a-cat", None, sent_at=NOON)  # of no end: not noted
    assert not got(store).record.webhook_due
    finished = store.finish(claimed, "succeeded", output=["x"], completed_at=NOON)
    store.note_webhook("a-cat", NOON + timedelta(hours=1), sent_at=NOON)  # of another: neither
    assert got(other).record.webhook_due

    with pytest.raises(RecordError, match=r"webhook\.sent_at"):
        other.note_webhook("a-cat", NOON, sent_at=NOON.replace(tzinfo=None))
    other.note_webhook("a-cat", NOON, sent_at=NOON)
    store.note_webhook("a-cat", NOON, sent_at=NOON + timedelta(hours=1))  # the first one counts

    after = got(store)
    assert not after.record.webhook_due
    assert after.record == finished.changed(webhook=Webhook(url="https://me/1", sent_at=NOON))


def test_a_webhook_that_was_given_up_is_due_no_more_and_one_that_is_tried_again_is(
    store: BlockingRecords,
) -> None:
    store.finish(claim(store, webhook=Webhook(url="https://me/1")), "succeeded", completed_at=NOON)

    store.note_webhook("a-cat", NOON, tried_until=NOON + timedelta(minutes=1))
    tried = got(store).record
    store.note_webhook("a-cat", NOON, gave_up_at=NOON + timedelta(minutes=2))

    assert (tried.webhook_due, tried.settled) == (True, False)
    given_up = got(store).record
    assert (given_up.webhook_due, given_up.settled) == (False, True)
    assert given_up.webhook is not None
    assert given_up.webhook.tried_until == NOON + timedelta(minutes=1)


def test_the_next_end_is_told_though_the_one_before_was(
    store: BlockingRecords, other: BlockingRecords
) -> None:
    first = claim(store, webhook=Webhook(url="https://me/1"))
    store.finish(first, "canceled", may_run_again=True, completed_at=NOON)
    store.note_webhook("a-cat", NOON, sent_at=NOON)

    other.finish(claim(other), "succeeded")

    record = got(store).record
    assert record.webhook_due
    assert record.webhook == Webhook(url="https://me/1")


@pytest.mark.parametrize("webhook", [None, Webhook(url="https://me/1", events_filter=("logs",))])
def test_who_did_not_ask_is_not_told(store: BlockingRecords, webhook: Webhook | None) -> None:
    store.finish(claim(store, webhook=webhook), "succeeded", completed_at=NOON)
    store.note_webhook("a-cat", NOON, sent_at=NOON)
    store.note_webhook("nobody", NOON, sent_at=NOON)

    assert not got(store).record.webhook_due


def test_a_takeover_begins_from_nothing(store: BlockingRecords, other: BlockingRecords) -> None:
    claimed = claim(store, lease_seconds=0)
    store.renew(claimed, status="processing", started_at=NOON, metrics={"step": 2})

    retaken = claim(other).record

    assert (retaken.status, retaken.started_at, retaken.metrics) == ("starting", None, {})


def test_a_takeover_keeps_the_webhook_unless_there_is_a_new_one(
    store: BlockingRecords, other: BlockingRecords
) -> None:
    first, second = Webhook(url="https://me/1"), Webhook(url="https://me/2")
    claim(store, webhook=first, lease_seconds=0)

    assert claim(other, lease_seconds=0).record.webhook == first
    assert claim(other, webhook=second).record.webhook == second


def test_an_unknown_id_is_none(store: BlockingRecords) -> None:
    assert store.get("nobody") is None


def test_an_unknown_id_is_none_where_the_server_answers_403_to_who_may_not_list_everything(
    s3: EmbeddedS3, store: BlockingRecords, bucket: str
) -> None:
    refusal = Fault("status", bucket=bucket, key="predictions/*.json", status=403)
    with s3.fault(refusal):
        assert store.get("nobody") is None
        claim(store)
        with pytest.raises(RecordError, match=rf"cannot read s3://{bucket}/predictions/a-cat\.jso"):
            store.get("a-cat")


def test_a_bucket_that_is_gone_is_a_clear_error(storage: StorageSettings) -> None:
    store = BlockingRecords(storage, f"gone-{uuid.uuid4().hex[:8]}")

    for call in (
        lambda: store.claim(asked()),
        lambda: store.get("a-cat"),
        lambda: store.recent(5),
        lambda: store.enter(asked()),
    ):
        with pytest.raises(RecordError, match=r"s3://gone-\w+/predictions/.*the bucket does not e"):
            call()


def test_a_keypair_without_rights_is_told_which_and_where(s3: EmbeddedS3, bucket: str) -> None:
    nothing = {"Effect": "Allow", "Action": "s3:GetObject", "Resource": "arn:aws:s3:::x/*"}
    keys = s3.create_user(f"{bucket}-user", {"Version": "2012-10-17", "Statement": [nothing]})
    store = BlockingRecords(storage_of(s3, keys), bucket)

    for call, object_and_advice in (
        (lambda: store.claim(asked()), rf"write s3://{bucket}/predictions/\S+: .*policy attached"),
        (lambda: store.get("a-cat"), rf"read s3://{bucket}/predictions/a-cat\.json: .*policy at"),
        (lambda: store.recent(5), rf"list s3://{bucket}/predictions/by-time/\*: .*ListPredictions"),
    ):
        with pytest.raises(ImagesError, match=object_and_advice) as caught:
            call()
        assert keys.secret_access_key not in str(caught.value)


def test_a_prediction_costs_three_writes_and_asking_again_one_write_and_one_read(
    s3: EmbeddedS3, bucket: str, store: BlockingRecords
) -> None:
    claim(store, "the first tries the server")
    before = len(s3.requests(bucket))

    claimed = claim(store)
    store.enter(claimed.record)
    store.finish(claimed, "succeeded")
    existing(store)

    methods = [(record.method, record.status) for record in s3.requests(bucket)[before:]]
    assert methods == [("PUT", 200)] * 3 + [("PUT", 412), ("GET", 200)]


def test_a_record_that_was_deleted_meanwhile_is_not_written_again(
    client: S3Client, bucket: str, store: BlockingRecords
) -> None:
    claimed = claim(store)
    client.delete_object(Bucket=bucket, Key="predictions/a-cat.json")

    with pytest.raises(LostLeaseError, match=r"a-cat\.json was deleted meanwhile"):
        store.finish(claimed, "succeeded")

    assert store.get("a-cat") is None


def test_what_ended_undone_is_generated_for_whoever_asks_again(
    store: BlockingRecords, other: BlockingRecords
) -> None:
    first = claim(store, background=True)
    undone = store.finish(first, "canceled", error="its caller left", may_run_again=True)
    assert undone.finished

    again = claim(other, created_at=NOON + timedelta(hours=1))

    assert (again.record.status, again.record.error) == ("starting", None)
    assert (again.record.attempts, again.record.reruns) == (1, 1)  # nobody died over it
    assert again.record.created_at == NOON + timedelta(hours=1)
    assert not again.record.background  # who wanted that got its end
    assert not other.finish(again, "succeeded", output=["one"]).may_run_again
    assert not isinstance(store.claim(asked()), Claimed)


def test_what_is_handed_back_has_killed_nobody(
    store: BlockingRecords, other: BlockingRecords
) -> None:
    for _ in range(5):
        store.hand_back(claim(store), background=True)

    left = got(store)
    assert (left.record.attempts, left.abandoned, left.record.background) == (0, True, True)
    assert claim(other).record.attempts == 1


def test_its_owner_hears_when_it_renews_that_it_is_to_go_on_without_its_caller(
    store: BlockingRecords, other: BlockingRecords
) -> None:
    claimed = claim(store)

    assert other.ask_to_keep("a-cat")

    assert store.renew(claimed, status="processing").record.background
    assert got(other).record.background
    assert not other.ask_to_keep("nobody")


def test_its_owner_hears_when_it_renews_that_somebody_wants_it_canceled(
    store: BlockingRecords, other: BlockingRecords
) -> None:
    claimed = claim(store)

    assert other.ask_to_cancel(claimed.record.id)

    renewed = store.renew(claimed, status="processing")
    assert renewed.record.cancel_requested
    assert store.finish(renewed, "canceled").status == "canceled"
    assert not other.ask_to_cancel(claimed.record.id)
    assert not other.ask_to_cancel("nobody-knows")
