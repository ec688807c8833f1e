"""One bucket, as this room uses it: small objects whole, ranges into memory that is already there, uploads.

Every failure leaves here as a `BucketError` that names the object, what was being done and what to try. Retries of
a request are boto3's own; retries of a broken body are the reader's.
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from botocore import exceptions as botocore_errors
from urllib3 import exceptions as urllib3_errors

from s3 import content_md5, error_code, explain
from weights.errors import BucketError, CorruptObjectError, ObjectChangedError, OversizedError

if TYPE_CHECKING:
    from datetime import datetime

    from mypy_boto3_s3 import S3Client

NETWORK_ERRORS = (botocore_errors.BotoCoreError, urllib3_errors.HTTPError, OSError)
# urllib3's readinto reads into memory of its own first; at 1 MiB that stays in the processor's cache, and 16 threads
# take 16 MiB with it, not 256.
READ_SIZE = 1024 * 1024
UNREACHABLE = "Unreachable"  # our code for a request that got no answer at all
# At a small object whose body breaks off; the request itself is retried by boto3.
BODY_ATTEMPTS = 3
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ObjectInfo:
    """What a listing says of an object; `etag` without its quotes."""

    key: str
    size: int
    etag: str
    modified: datetime


class Bucket:
    """A bucket by name, over a boto3 client. Safe to use from many threads."""

    def __init__(self, client: S3Client, name: str) -> None:
        self.client = client
        self.name = name

    def url(self, key: str) -> str:
        """The object's name for people: s3://bucket/key."""
        return f"s3://{self.name}/{key}"

    def get(self, key: str, *, limit: int) -> bytes:
        """Read a small object whole, again if the answer breaks off.

        Raises BucketError, and OversizedError when it has more than `limit` bytes.
        """
        for attempt in range(1, BODY_ATTEMPTS + 1):
            with self.explained("read", key):
                answer = self.client.get_object(Bucket=self.name, Key=key)
                with contextlib.closing(answer["Body"]) as body:
                    if answer.get("ContentLength", limit) > limit:
                        raise OversizedError(
                            f"cannot read {self.url(key)}: it has {answer['ContentLength']} bytes where at most "
                            f"{limit} make sense. It is not what it should be: publish the model again"
                        )
                    try:
                        return body.read()
                    except NETWORK_ERRORS as error:
                        if attempt == BODY_ATTEMPTS:
                            raise
                        reason = explain(error)
            logger.warning("reading %s again: %s", self.url(key), reason.cause)
        raise AssertionError("the last attempt returns or raises")

    def read_range(
        self, key: str, start: int, into: Sequence[memoryview], *, size: int, etag: str | None
    ) -> str:
        """Fill the buffers `into`, one after another, with the object's bytes from `start` on; return its ETag.

        `size` is the object's whole size, `etag` the ETag it must have (None: any). The ETag of the answer is
        compared here, since caches in front of S3 ignore If-Match. Raises BucketError, ObjectChangedError when it
        was replaced, CorruptObjectError when it is shorter or longer than `size`; a body that breaks off raises
        what the connection raised, for the caller to retry.
        """
        length = sum(len(part) for part in into)
        condition: Any = {"IfMatch": f'"{etag}"'} if etag else {}
        wanted = f"bytes={start}-{start + length - 1}"
        try:
            with self.explained("read", key):
                answer = self.client.get_object(
                    Bucket=self.name, Key=key, Range=wanted, **condition
                )
        except BucketError as error:
            if error.code == "PreconditionFailed":
                raise self._replaced(key, "another", etag) from error
            raise
        body = answer["Body"]
        try:
            if not {"ETag", "ContentLength"} <= answer.keys():
                raise BucketError(
                    f"cannot read {self.url(key)}: the answer has no ETag or no Content-Length, so it cannot be "
                    "trusted. Check the proxy or cache in front of the bucket"
                )
            self._check_answer(key, answer, start, length, size, etag)
            for part in into:
                filled = 0
                while filled < len(part):
                    count = body.readinto(part[filled : filled + READ_SIZE])  # type: ignore[arg-type] # its stub wants a file
                    if not count:
                        raise BucketError(
                            f"cannot read {self.url(key)}: the answer to {wanted} broke off"
                        )
                    filled += count
            # Reading to the end is what hands the connection back to the pool.
            if body.read(1):
                raise BucketError(
                    f"cannot read {self.url(key)}: the answer to {wanted} is too long"
                )
        except BaseException:
            body.close()  # the connection is not reusable with half an answer in it
            raise
        return answer["ETag"].strip('"')

    def _check_answer(
        self, key: str, answer: Any, start: int, length: int, size: int, etag: str | None
    ) -> None:
        got = answer["ETag"].strip('"')
        if etag and got != etag:
            raise self._replaced(key, got, etag)
        # Some servers answer 200 with a right Content-Range; what counts is the range, not the status.
        content_range = _CONTENT_RANGE.fullmatch(answer.get("ContentRange", ""))
        if content_range is None:
            if start == 0 and answer["ContentLength"] == length == size:
                return
            raise BucketError(
                f"cannot read {self.url(key)}: the server ignored the range bytes={start}-{start + length - 1}. "
                "Ranged reads are needed: check what stands between this machine and the bucket"
            )
        first, last, total = content_range.groups()
        if total not in ("*", str(size)):
            raise CorruptObjectError(
                f"{self.url(key)} has {total} bytes where {size} were published: it was truncated or replaced. "
                "Publish the model again"
            )
        if int(first) != start or int(last) != start + length - 1:
            raise BucketError(
                f"cannot read {self.url(key)}: asked for bytes {start}-{start + length - 1}, "
                f"got {first}-{last}. Try again; if it stays, check the proxy or cache in front of the bucket"
            )

    def _replaced(self, key: str, got: str, etag: str | None) -> ObjectChangedError:
        return ObjectChangedError(
            f"{self.url(key)} was replaced while it was read (ETag {got}, before {etag}). "
            "A published version is never overwritten: load again, or publish the model again"
        )

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """Every object under `prefix`, page by page. Raises BucketError."""
        with self.explained("list", f"{prefix}*"):
            pages = self.client.get_paginator("list_objects_v2").paginate(
                Bucket=self.name, Prefix=prefix
            )
            for page in pages:
                for found in page.get("Contents", []):
                    yield ObjectInfo(
                        found["Key"],
                        found["Size"],
                        found["ETag"].strip('"'),
                        found["LastModified"],
                    )

    def size(self, key: str) -> int | None:
        """The object's size in bytes; None when there is none to be seen. Raises BucketError."""
        try:
            with self.explained("look at", key):
                return self.client.head_object(Bucket=self.name, Key=key)["ContentLength"]
        except BucketError as error:
            if error.is_missing_or_hidden:
                return None
            raise

    def put(self, key: str, data: bytes, *, content_type: str) -> None:
        """Write a small object whole; the server refuses it if the bytes do not arrive as sent."""
        with self.explained("write", key):
            self.client.put_object(
                Bucket=self.name,
                Key=key,
                Body=data,
                ContentType=content_type,
                ContentMD5=content_md5(data),
            )

    @contextlib.contextmanager
    def explained(self, doing: str, key: str) -> Iterator[None]:
        """Turn what boto3 or the connection raises into a BucketError about this object."""
        try:
            yield
        except botocore_errors.ClientError as error:
            raise BucketError(
                f"cannot {doing} {self.url(key)}: {explain(error)}", error_code(error)
            ) from error
        except NETWORK_ERRORS as error:
            raise BucketError(
                f"cannot {doing} {self.url(key)}: {explain(error)}", UNREACHABLE
            ) from error
