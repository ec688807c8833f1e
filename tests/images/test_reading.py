"""An image of the store is read back by the URL it was given, and nothing else is."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import pytest
from PIL import Image

from demo.s3 import EmbeddedS3
from images import store as store_module
from images.encode import EncodedImage, encode
from images.errors import ImagesError
from images.store import ImageStore

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

NOON = datetime(2026, 11, 26, 12, tzinfo=UTC)


@pytest.fixture
def client(s3: EmbeddedS3) -> S3Client:
    return s3.client()  # type: ignore[no-any-return]


@pytest.fixture
def bucket(new_bucket: Callable[[], str]) -> str:
    return new_bucket()


def picture() -> EncodedImage:
    return encode(Image.new("RGB", (8, 8), "red"), "webp", 80, {})


@pytest.mark.parametrize("prefix", ["", "team/one"])
@pytest.mark.parametrize("public", [None, "https://images.example", "https://a.example/b/"])
def test_an_image_is_read_by_its_url(
    client: S3Client, bucket: str, prefix: str, public: str | None
) -> None:
    store = ImageStore(client, bucket, prefix, public_base_url=public)
    stored = store.upload(picture(), prediction_id="a fox/ü", index=0, now=NOON)

    read = store.read(stored.url)

    assert read.data == picture().data
    assert read.content_type == "image/webp"


def test_a_url_that_has_expired_is_as_good(client: S3Client, bucket: str) -> None:
    """Its signature is not what opens the bucket."""
    store = ImageStore(client, bucket)
    url = store.upload(picture(), prediction_id="fox", index=0, now=NOON).url

    assert store.read(url.partition("?")[0]).data == picture().data


@pytest.mark.parametrize(
    "url",
    [
        "https://images.example/2026/11/26/fox-0.png",
        "http://169.254.169.254/latest/meta-data",
        "file:///etc/passwd",
        "http://[",
        "",
    ],
)
def test_nothing_else_is_read(client: S3Client, bucket: str, url: str) -> None:
    with pytest.raises(ImagesError, match=f"is no image of bucket {bucket}"):
        ImageStore(client, bucket, "team").read(url)


@pytest.mark.parametrize("public", [None, "https://images.example"])
def test_what_lies_beside_the_prefix_is_not_read(
    client: S3Client, bucket: str, public: str | None
) -> None:
    elsewhere = ImageStore(client, bucket, "other", public_base_url=public)
    url = elsewhere.upload(picture(), prediction_id="fox", index=0, now=NOON).url

    with pytest.raises(ImagesError, match="is no image of bucket"):
        ImageStore(client, bucket, "team", public_base_url=public).read(url)


def test_an_image_that_is_gone_is_named(client: S3Client, bucket: str) -> None:
    store = ImageStore(client, bucket)
    stored = store.upload(picture(), prediction_id="fox", index=0, now=NOON)
    client.delete_object(Bucket=bucket, Key=stored.key)

    with pytest.raises(ImagesError, match=f"cannot read s3://{bucket}/{stored.key}: there is no"):
        store.read(stored.url)


def test_an_image_that_is_too_large_is_not_held(
    client: S3Client, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = ImageStore(client, bucket)
    stored = store.upload(picture(), prediction_id="fox", index=0, now=NOON)
    monkeypatch.setattr(store_module, "LARGEST_IMAGE", len(picture().data) - 1)

    with pytest.raises(ImagesError, match="fetch it by its URL"):
        store.read(stored.url)
