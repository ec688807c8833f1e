"""What tests of the gateway share: the runner of a few lines, and a bucket with its records."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from demo.s3 import EmbeddedS3
from images.records import RecordStore
from tests.support.gateway_server import small_runner


@pytest.fixture(scope="session")
def runner_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_runner(tmp_path_factory.mktemp("runner"))


@pytest.fixture
def bucket(new_bucket: Callable[[], str]) -> str:
    return new_bucket()


@pytest.fixture
def records(s3: EmbeddedS3, bucket: str) -> RecordStore:
    """Another gateway's, or one's that is gone."""
    return RecordStore(s3.client(), bucket)
