"""What a whole gateway needs: a bucket of its own, and a folder with the runner of a few lines."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from demo.s3 import EmbeddedS3
from tests.support.gateway_server import small_runner


@pytest.fixture(scope="session")
def runner_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_runner(tmp_path_factory.mktemp("runner"))


@pytest.fixture
def gateway_environment(s3: EmbeddedS3, new_bucket: Callable[[], str]) -> dict[str, str]:
    """With a bucket of this test's own."""
    return {**s3.environment(), "PUBLIC_BUCKET_NAME": new_bucket()}
