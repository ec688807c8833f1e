"""What tests of several rooms share: one embedded S3 server, one small model, and fresh buckets."""

import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from demo.s3 import EmbeddedS3
from demo.small_sdxl import write_small_sdxl
from tests.support.system_programs import pytest_runtest_setup

__all__ = ["pytest_runtest_setup"]  # a hook: pytest finds it by its name


@dataclass(frozen=True)
class Buckets:
    """The names of the two buckets that a deployment has."""

    models: str
    images: str


@pytest.fixture(scope="session")
def s3() -> Iterator[EmbeddedS3]:
    """An S3 server with rights enforced, for the whole run: tests keep apart by using buckets of their own."""
    with EmbeddedS3() as server:
        yield server


@pytest.fixture(scope="session")
def admin(s3: EmbeddedS3) -> Any:
    """A boto3 S3 client that may do everything."""
    return s3.client()


@pytest.fixture
def new_bucket(s3: EmbeddedS3) -> Callable[[], str]:
    """Creates a private bucket and returns its name, new each time."""

    def create() -> str:
        name = f"bucket-{uuid.uuid4().hex[:12]}"
        s3.create_bucket(name)
        return name

    return create


@pytest.fixture
def gateway_environment(s3: EmbeddedS3, new_bucket: Callable[[], str]) -> dict[str, str]:
    """What a whole gateway needs, with a bucket of this test's own."""
    return {**s3.environment(), "PUBLIC_BUCKET_NAME": new_bucket()}


@pytest.fixture
def buckets(new_bucket: Callable[[], str]) -> Buckets:
    """Two fresh private buckets: one for models, one for images."""
    return Buckets(models=new_bucket(), images=new_bucket())


@pytest.fixture(scope="session")
def small_sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small model's folder (float32, 4 steps, 256 pixels), written once: read it, do not write to it."""
    return write_small_sdxl(tmp_path_factory.mktemp("small-sdxl") / "model")
