"""Two replicas' records of predictions in one fresh bucket, and a server that knows less than the embedded one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import pytest

from demo.s3 import EmbeddedS3
from settings import StorageSettings
from tests.images.plain_s3 import PlainS3
from tests.images.test_store import connect
from tests.support.records import BlockingRecords, storage_of

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client


@pytest.fixture
def client(s3: EmbeddedS3) -> S3Client:
    return connect(s3.endpoint_url, s3.admin)


@pytest.fixture
def bucket(new_bucket: Callable[[], str]) -> str:
    return new_bucket()


@pytest.fixture
def storage(s3: EmbeddedS3) -> StorageSettings:
    return storage_of(s3)


@pytest.fixture
def store(storage: StorageSettings, bucket: str) -> BlockingRecords:
    return BlockingRecords(storage, bucket)


@pytest.fixture
def other(storage: StorageSettings, bucket: str) -> BlockingRecords:
    """Another replica's."""
    return BlockingRecords(storage, bucket)


@pytest.fixture
def plain() -> Iterator[PlainS3]:
    with PlainS3() as server:
        yield server
