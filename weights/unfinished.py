"""Multipart uploads that a run left behind when it was killed: taken up by the next one, or put away.

A part that the server holds is worth something if its size and ETag are those of the part that would be sent. An
upload is abandoned once nothing has arrived for it for a while: another owner's run may be in the middle of it.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from weights.bucket import Bucket
from weights.errors import BucketError
from weights.manifest import is_version
from weights.objects import UNREACHABLE

# A run that is alive sends 32 MiB at a time: at 1 Mbit/s, eight parts at once, that is one part every 36 minutes.
SILENCE_OF_THE_DEAD = timedelta(days=1)
SILENCE_BEFORE_PRUNING = timedelta(hours=1)
GONE = frozenset({"NoSuchUpload", "NoSuchKey"})

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class UnfinishedUpload:
    """An upload that was begun for `key`, and neither completed nor aborted."""

    key: str
    upload_id: str
    begun: datetime


@dataclass(frozen=True)
class HeldPart:
    """A part that the server has; `etag` without its quotes is the MD5 of its bytes on most servers."""

    size: int
    etag: str
    arrived: datetime


class Resumption:
    """Finds what earlier runs left of an upload; where the server does not tell, says so once and finds nothing."""

    def __init__(self, bucket: Bucket) -> None:
        self._bucket = bucket
        self._lock = threading.Lock()
        self._possible = True

    def find(self, key: str) -> tuple[UnfinishedUpload, Mapping[int, HeldPart]] | None:
        """The unfinished upload for exactly `key` that holds the most parts, and those. Raises BucketError if there
        is no answer at all."""
        if not self._possible:
            return None
        try:
            # By the whole key: there are servers (MinIO) that list no uploads for less.
            found = [
                (upload, held_parts(self._bucket, upload))
                for upload in unfinished_uploads(self._bucket, key)
                if upload.key == key
            ]
        except BucketError as error:
            if error.code == UNREACHABLE:
                raise
            if error.code not in GONE:  # completed by somebody else while it was being looked at
                self._give_up(error)
            return None
        return max(found, key=lambda one: len(one[1]), default=None)

    def _give_up(self, error: BucketError) -> None:
        with self._lock:
            told, self._possible = not self._possible, False
        if not told:
            logger.warning(
                "parts that an interrupted run has sent are sent again, since they cannot be listed: %s",
                error,
            )


def unfinished_uploads(bucket: Bucket, prefix: str) -> Iterator[UnfinishedUpload]:
    """Every unfinished upload whose key begins with `prefix`. Raises BucketError (s3:ListBucketMultipartUploads)."""
    with bucket.explained("list the unfinished uploads of", f"{prefix}*"):
        pages = bucket.client.get_paginator("list_multipart_uploads").paginate(
            Bucket=bucket.name, Prefix=prefix
        )
        for page in pages:
            for found in page.get("Uploads", []):
                yield UnfinishedUpload(found["Key"], found["UploadId"], found["Initiated"])


def held_parts(bucket: Bucket, upload: UnfinishedUpload) -> dict[int, HeldPart]:
    """The parts that the server has, by number. Raises BucketError (s3:ListMultipartUploadParts)."""
    with bucket.explained("list the parts of the unfinished upload of", upload.key):
        pages = bucket.client.get_paginator("list_parts").paginate(
            Bucket=bucket.name, Key=upload.key, UploadId=upload.upload_id
        )
        return {
            part["PartNumber"]: HeldPart(
                part["Size"], part["ETag"].strip('"'), part["LastModified"]
            )
            for page in pages
            for part in page.get("Parts", [])
        }


def abort_upload(bucket: Bucket, key: str, upload_id: str) -> None:
    """Have the server drop an upload and its parts; one that is gone already is as good. Raises BucketError."""
    try:
        with bucket.explained("clean up the unfinished upload of", key):
            bucket.client.abort_multipart_upload(Bucket=bucket.name, Key=key, UploadId=upload_id)
    except BucketError as error:
        if error.code not in GONE:
            raise


def abort_leftovers(
    bucket: Bucket, model_path: str, *, silence: timedelta, whole: str | None = None
) -> int:
    """Put away uploads of this model that nobody will finish, and return how many.

    Those are all uploads for the version `whole`, whose files are all there, and of the other versions' those for
    which nothing has arrived for `silence`. Raises BucketError.
    """
    aborted = 0
    for upload in list(unfinished_uploads(bucket, f"{model_path}/")):
        version = upload.key.removeprefix(f"{model_path}/").partition("/")[0]
        if not is_version(version):  # another model's, whose path begins with this one's
            continue
        if version == whole or _is_silent(bucket, upload, silence):
            abort_upload(bucket, upload.key, upload.upload_id)
            aborted += 1
    return aborted


def _is_silent(bucket: Bucket, upload: UnfinishedUpload, silence: timedelta) -> bool:
    before = datetime.now(UTC) - silence
    if upload.begun > before:
        return False
    try:
        arrivals = [part.arrived for part in held_parts(bucket, upload).values()]
    except BucketError as error:
        if error.code in GONE:
            return False
        raise
    return max(arrivals, default=upload.begun) <= before
