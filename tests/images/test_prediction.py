"""What a prediction's record says, under which name, and what is refused in its place."""

from __future__ import annotations

import hashlib
import json
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import pytest

from images.errors import RecordError
from images.prediction import LARGEST_RECORD, Webhook, record_name
from images.records import Claimed
from settings import StorageSettings
from tests.images.claims import CAT, asked, claim, document, existing, got, write
from tests.support.records import BlockingRecords

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client


def test_the_order_of_an_inputs_fields_makes_no_other_input(store: BlockingRecords) -> None:
    claim(store, "a-cat", {"prompt": "a cat", "seed": 7})

    assert existing(store, "a-cat", {"seed": 7, "prompt": "a cat"}).same_input


IDS = [
    "a-b",
    "a/b",
    "a b",
    "a.b",
    "a..b",
    "A-b",
    "../a-b",
    "a-b.json",
    "by-time/a-b",
    "é",
    "e\u0301",
    "日本語",
    "x" * 64,
    "x" * 65,
    "x" * 5000,
    " ",
    ".",
    "line\r\nbreak\0",
    "sha256-" + "0" * 64,
]


def test_ids_that_look_alike_have_records_of_their_own(store: BlockingRecords) -> None:
    for number, prediction_id in enumerate(IDS):
        store.finish(claim(store, prediction_id), "succeeded", output=number)

    assert [got(store, prediction_id).record.output for prediction_id in IDS] == [*range(len(IDS))]
    assert [got(store, prediction_id).record.id for prediction_id in IDS] == IDS


def test_an_id_that_is_the_name_of_a_hashed_one_is_hashed_itself(store: BlockingRecords) -> None:
    claim(store, "a/b")

    assert isinstance(store.claim(asked(record_name("a/b"))), Claimed)


def test_a_record_lies_under_the_prefix_by_its_id(
    client: S3Client, storage: StorageSettings, bucket: str
) -> None:
    store = BlockingRecords(storage, bucket, "//team/a/")

    claimed = claim(store)
    store.enter(claimed.record)

    keys = [item["Key"] for item in client.list_objects_v2(Bucket=bucket)["Contents"]]
    assert keys == [
        "team/a/predictions/a-cat.json",
        f"team/a/predictions/by-time/{claimed.record.place_in_time}",
        "team/a/predictions/conditional-writes",
    ]


def test_the_document_says_what_there_is_and_no_secret(
    client: S3Client, bucket: str, store: BlockingRecords
) -> None:
    claimed = claim(store, webhook=Webhook(url="https://me/hook", events_filter=("completed",)))

    content = document(client, bucket)

    assert content.pop("claim") == claimed.record.claim
    assert content == {
        "format": "lightning-in-a-bucket/prediction/1",
        "id": "a-cat",
        "input": CAT,
        "input_sha256": hashlib.sha256(b'{"prompt":"a cat","seed":7}').hexdigest(),
        "webhook": {
            "url": "https://me/hook",
            "events_filter": ["completed"],
            "sent_at": None,
            "gave_up_at": None,
            "tried_until": None,
        },
        "status": "starting",
        "output": None,
        "error": None,
        "metrics": {},
        "logs": "",
        "created_at": "2026-11-20T12:00:00Z",
        "started_at": None,
        "completed_at": None,
        "owner": store.owner,
        "attempts": 1,
        "reruns": 0,
        "lease_seconds": 60.0,
        "background": False,
        "cancel_requested": False,
        "may_run_again": False,
    }


def test_a_webhook_with_a_password_is_refused() -> None:
    with pytest.raises(ValueError, match="must not hold a user name or password") as caught:
        Webhook(url="https://me:hunter2@example.com/hook")

    with pytest.raises(RecordError) as told:
        asked(webhook={"url": "https://me:hunter2@example.com/hook"})

    assert "hunter2" not in str(told.value)
    assert caught.value


def test_fields_of_a_newer_release_survive(
    client: S3Client, bucket: str, store: BlockingRecords
) -> None:
    claim(store, lease_seconds=0, webhook=Webhook(url="https://me/1"))
    content = document(client, bucket)
    content["webhook"]["retries"] = 3
    write(client, bucket, json.dumps({**content, "region": {"name": "eu"}}).encode())

    store.finish(store.renew(claim(store)), "succeeded")

    after = document(client, bucket)
    assert after["region"] == {"name": "eu"}
    assert after["webhook"]["retries"] == 3


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "Expecting value"),
        (b"{", "Expecting property name"),
        (b"[1]", "valid dictionary"),
        (b"\xff\xfe\x00", "decode"),
        (b"[" * 100_000, "recursion"),
        (b'{"format": "lightning-in-a-bucket/prediction/2"}', "format: "),
        (b'{"prompt": "a private matter"}', "id: Field required"),
    ],
)
def test_what_is_no_record_is_a_clear_error(
    client: S3Client, bucket: str, store: BlockingRecords, content: bytes, problem: str
) -> None:
    write(client, bucket, content)

    for call in (lambda: store.get("a-cat"), lambda: store.claim(asked())):
        with pytest.raises(RecordError) as caught:
            call()
        message = str(caught.value)
        assert f"s3://{bucket}/predictions/a-cat.json is no prediction's record" in message
        assert problem in message
        assert "private" not in message
    assert client.get_object(Bucket=bucket, Key="predictions/a-cat.json")["Body"].read() == content


def test_a_record_of_another_id_is_a_clear_error(
    client: S3Client, bucket: str, store: BlockingRecords
) -> None:
    claim(store)
    content = document(client, bucket)
    write(client, bucket, json.dumps({**content, "id": "A-CAT"}).encode())

    with pytest.raises(RecordError, match=r"a-cat\.json holds another prediction's record"):
        store.claim(asked())


def test_what_is_too_large_is_neither_written_nor_read(
    client: S3Client, bucket: str, store: BlockingRecords
) -> None:
    with pytest.raises(RecordError, match=rf"and {LARGEST_RECORD} are the most: send a smaller"):
        store.claim(asked("a-cat", {"prompt": "x" * LARGEST_RECORD}))
    write(client, bucket, b" " * (LARGEST_RECORD + 1))
    with pytest.raises(RecordError, match=rf"a-cat\.json: it has {LARGEST_RECORD + 1} bytes"):
        store.get("a-cat")


@pytest.mark.parametrize("value", [float("nan"), {"x": datetime.now(UTC)}, "\ud800"])
def test_an_input_that_is_no_json_is_refused(value: Any) -> None:
    with pytest.raises(RecordError, match="cannot be recorded"):
        asked("a-cat", {"prompt": value})


def test_an_error_that_quotes_half_a_character_is_recorded(store: BlockingRecords) -> None:
    store.finish(claim(store), "failed", error="no such word: \ud83d")

    assert got(store).record.error == "no such word: ?"


def test_a_result_that_is_no_json_leaves_the_record_as_it_was(store: BlockingRecords) -> None:
    claimed = claim(store)

    with pytest.raises(RecordError, match="prediction a-cat"):
        store.finish(claimed, "succeeded", metrics={"seconds": float("nan")})

    assert got(store).record == claimed.record
