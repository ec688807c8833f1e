"""What tests of predictions' records do over and over: ask, claim, and look at what is recorded."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from images.prediction import PredictionRecord
from images.records import Claimed, Existing, Stored
from tests.support.records import BlockingRecords

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

NOON = datetime(2026, 11, 20, 12, 0, tzinfo=UTC)


CAT = {"prompt": "a cat", "seed": 7}


def asked(prediction_id: str = "a-cat", input: Any = None, **more: Any) -> PredictionRecord:
    return PredictionRecord.of(prediction_id, input or CAT, **{"created_at": NOON, **more})


def claim(
    store: BlockingRecords, *arguments: Any, lease_seconds: float = 60, **more: Any
) -> Claimed:
    claimed = store.claim(asked(*arguments, **more), lease_seconds)
    assert isinstance(claimed, Claimed)
    return claimed


def existing(store: BlockingRecords, *arguments: Any) -> Existing:
    found = store.claim(asked(*arguments))
    assert isinstance(found, Existing)
    return found


def got(store: BlockingRecords, prediction_id: str = "a-cat") -> Stored:
    stored = store.get(prediction_id)
    assert stored is not None
    return stored


def all_claim(stores: list[BlockingRecords], **more: Any) -> list[Claimed | Existing]:
    """What each of them gets that claims at the same moment."""
    together = threading.Barrier(len(stores))

    def compete(store: BlockingRecords) -> Claimed | Existing:
        together.wait()
        return store.claim(asked(**more))

    with ThreadPoolExecutor(len(stores)) as pool:
        return list(pool.map(compete, stores))


def document(client: S3Client, bucket: str, key: str = "predictions/a-cat.json") -> dict[str, Any]:
    content: dict[str, Any] = json.loads(client.get_object(Bucket=bucket, Key=key)["Body"].read())
    return content


def write(client: S3Client, bucket: str, content: bytes) -> None:
    client.put_object(Bucket=bucket, Key="predictions/a-cat.json", Body=content)
