"""A model that lies in an S3 bucket, be it diffusers' files as they are or a version that this product published."""

from __future__ import annotations

from pathlib import Path

from preparation.access import Access
from preparation.bucket_origin import BucketOrigin, open_origin
from preparation.source import SourceName
from settings import SourceSettings
from weights import Bucket


def open_s3(name: SourceName, settings: SourceSettings, *, cache: Path, jobs: int) -> BucketOrigin:
    """What lies there; files that are fetched go under `cache`. Raises what `open_origin` raises."""
    storage = settings.source_storage()
    return open_origin(
        name,
        Bucket(storage, name.bucket, connections=jobs),
        Access.of_s3(settings),
        cache=cache / "s3" / name.bucket,
        server=storage.endpoint_url or "AWS",
    )
