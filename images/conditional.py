"""Small documents in a bucket that change only if nobody else changed them meanwhile: S3's conditional writes.

Whether a server keeps to the conditions is tried once, as many take them and ignore them. It knows nothing of what the
documents say.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

from images.errors import RecordError
from s3 import content_md5
from s3.async_client import AsyncClient, Listing, S3Error

# How often a write is repeated that collided with another at the same moment (409), and the longest wait before one.
ATTEMPTS = 5
LONGEST_WAIT_SECONDS = 0.2

# 412: it is there, or no longer what it was. 404: it is gone.
_CHANGED = ("PreconditionFailed", "NoSuchKey")
_CONFLICT = "ConditionalRequestConflict"
# What servers answer that know no conditions on writing.
_NO_CONDITIONS = ("NotImplemented", "501", "InvalidArgument", "InvalidRequest")
_NONE: Mapping[str, str] = {}
_NO_SUCH_ETAG = '"00000000000000000000000000000000"'

_log = logging.getLogger(__name__)


class ChangedError(Exception):
    """Somebody else has created, changed or deleted the document meanwhile: read it again and decide anew."""


@dataclass(frozen=True)
class Document:
    """What was read: `age` is how long ago it was written, in seconds of the server's clock."""

    data: bytes
    etag: str
    age: float


class ConditionalBucket:
    """A bucket's documents, for one event loop. What fails raises RecordError, naming the object."""

    def __init__(self, client: AsyncClient, bucket: str, probe_key: str, largest: int) -> None:
        """`probe_key` is where the server is tried: an empty object that stays. No document has more than `largest`
        bytes."""
        self.bucket = bucket
        self._client = client
        self._largest = largest
        self._probe_key = probe_key
        self._probing = asyncio.Lock()
        self._conditions_work: bool | None = None

    def url(self, key: str) -> str:
        """The object's name for people: s3://bucket/key."""
        return f"s3://{self.bucket}/{key}"

    async def create(self, key: str, data: bytes) -> str:
        """Write it if there is none, and return its ETag. Raises ChangedError where there is one."""
        if await self.conditions_work():
            return await self._put(key, data, {"If-None-Match": "*"})
        if await self.read(key) is not None:
            raise ChangedError
        return await self._put_and_look(key, data)

    async def replace(self, key: str, data: bytes, etag: str) -> str:
        """Write it if it still is what had that ETag, and return the new one. Raises ChangedError where it is not."""
        if await self.conditions_work():
            return await self._put(key, data, {"If-Match": etag})
        found = await self.read(key)
        if found is None or found.etag != etag:
            raise ChangedError
        return await self._put_and_look(key, data)

    async def put(self, key: str, data: bytes) -> None:
        """Write it, whatever is there."""
        await self._put(key, data)

    async def read(self, key: str) -> Document | None:
        """The document, or None where there is none. One that is too large is an error."""
        try:
            answer = await self._client.get(self.bucket, key, limit=self._largest)
        except S3Error as error:
            if error.code == "NoSuchKey" or (
                error.code == "AccessDenied" and await self._is_absent(key)
            ):
                return None
            raise self._error("read", key, error) from error
        told = answer.headers
        age = (_date(told.get("Date")) - _date(told.get("Last-Modified"))).total_seconds()
        return Document(answer.body, told.get("ETag", ""), max(0.0, age))

    async def list(self, prefix: str, *, after: str, limit: int) -> Listing:
        """At most `limit` keys under `prefix` that come after `after`."""
        try:
            return await self._list(prefix, after, limit)
        except S3Error as error:
            if error.code != "AccessDenied":
                raise self._error("list", f"{prefix}*", error) from error
            raise RecordError(
                f"cannot list {self.url(prefix)}*: the keypair may not do that. Attach the current policy for servers "
                "to it (iam/model-runner*.json, the statement ListPredictions: s3:ListBucket)"
            ) from error

    async def _list(self, prefix: str, after: str, limit: int) -> Listing:
        return await self._client.list_keys(self.bucket, prefix, after=after, limit=limit)

    async def _is_absent(self, key: str) -> bool:
        # AWS answers 403 instead of 404 to whoever may list only some prefixes: reading names no prefix, so that the
        # policy's condition is not met. Listing that one key tells them apart.
        try:
            found = await self._list(key, "", 1)
        except S3Error:
            return False  # the refusal to read is what is reported
        return key not in found.keys

    async def _put(self, key: str, data: bytes, condition: Mapping[str, str] = _NONE) -> str:
        headers = {
            "Content-MD5": content_md5(data),
            "Content-Type": "application/json",
            "Cache-Control": "no-store",  # a cache in front of the bucket would tell of an earlier state
            **condition,
        }
        for attempts_left in reversed(range(ATTEMPTS)):
            try:
                return await self._client.put(self.bucket, key, data, headers)
            except S3Error as error:
                if condition and error.code in _CHANGED:
                    raise ChangedError from None
                if error.code != _CONFLICT or not attempts_left:
                    raise self._error("write", key, error) from error
            await asyncio.sleep(LONGEST_WAIT_SECONDS * secrets.randbelow(1000) / 1000)
        raise AssertionError("the last attempt returns or raises")

    async def _put_and_look(self, key: str, data: bytes) -> str:
        etag = await self._put(key, data)
        found = await self.read(key)
        if found is None or found.data != data:
            raise ChangedError
        return etag

    async def conditions_work(self) -> bool:
        """Whether the server keeps to If-None-Match and If-Match on writing; asked with two or three PUTs, once."""
        async with self._probing:
            if self._conditions_work is None:
                self._conditions_work = await self._probe()
                if not self._conditions_work:
                    _log.warning(
                        "the S3 server of bucket %s has no conditional writes (If-None-Match, If-Match): predictions "
                        "are recorded by looking before and after each write, so the same id sent to two replicas at "
                        "one moment may be generated twice; one of the results is kept",
                        self.bucket,
                    )
            return self._conditions_work

    async def _probe(self) -> bool:
        # The first replica ever creates it, and is refused the second time.
        create, change = {"If-None-Match": "*"}, {"If-Match": _NO_SUCH_ETAG}
        there = await self._refuses(create) or await self._refuses(create)
        return there and await self._refuses(change)

    async def _refuses(self, condition: Mapping[str, str]) -> bool:
        try:
            await self._put(self._probe_key, b"", condition)
        except ChangedError:
            return True
        except RecordError as error:
            cause = error.__cause__
            if isinstance(cause, S3Error) and cause.code in _NO_CONDITIONS:
                return False
            raise
        return False

    def _error(self, verb: str, key: str, error: S3Error) -> RecordError:
        return RecordError(f"cannot {verb} {self.url(key)}: {error}")


def _date(value: str | None) -> datetime:
    """The server's clock; this machine's where the answer has no date."""
    try:
        return parsedate_to_datetime(value or "")
    except ValueError:
        return datetime.now(UTC)
