"""What tests of the gateway share: the runner of a few lines, and a bucket with its records."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from demo.s3 import EmbeddedS3
from tests.support.gateway_server import small_runner
from tests.support.records import BlockingRecords, storage_of


@pytest.fixture(scope="session")
def runner_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_runner(tmp_path_factory.mktemp("runner"))


@pytest.fixture
def bucket(new_bucket: Callable[[], str]) -> str:
    return new_bucket()


@pytest.fixture
def records(s3: EmbeddedS3, bucket: str) -> BlockingRecords:
    """Another gateway's, or one's that is gone."""
    return BlockingRecords(storage_of(s3), bucket)
