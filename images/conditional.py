"""Small documents in a bucket that change only if nobody else changed them meanwhile: S3's conditional writes.

Whether a server keeps to the conditions is tried once, as many take them and ignore them. It knows nothing of what the
documents say.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

from botocore.exceptions import BotoCoreError, ClientError

import s3
from images.errors import RecordError

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

# How often a write is repeated that collided with another at the same moment (409), and the longest wait before one.
ATTEMPTS = 5
LONGEST_WAIT_SECONDS = 0.2

# 412: it is there, or no longer what it was. 404: it is gone.
_CHANGED = ("PreconditionFailed", "NoSuchKey")
_CONFLICT = "ConditionalRequestConflict"
# What servers answer that know no conditions on writing.
_NO_CONDITIONS = ("NotImplemented", "501", "InvalidArgument", "InvalidRequest")
_NO_SUCH_ETAG = '"00000000000000000000000000000000"'

_log = logging.getLogger(__name__)


class _Condition(TypedDict, total=False):
    IfMatch: str
    IfNoneMatch: str


class ChangedError(Exception):
    """Somebody else has created, changed or deleted the document meanwhile: read it again and decide anew."""


@dataclass(frozen=True)
class Document:
    """What was read: `age` is how long ago it was written, in seconds of the server's clock."""

    data: bytes
    etag: str
    age: float


class ConditionalBucket:
    """A bucket's documents. Safe to use from several threads. What fails raises RecordError, naming the object."""

    def __init__(self, client: S3Client, bucket: str, probe_key: str, largest: int) -> None:
        """`probe_key` is where the server is tried: an empty object that stays. No document has more than `largest`
        bytes."""
        self.client = client
        self.bucket = bucket
        self._largest = largest
        self._probe_key = probe_key
        self._probing = threading.Lock()
        self._conditions_work: bool | None = None

    def url(self, key: str) -> str:
        """The object's name for people: s3://bucket/key."""
        return f"s3://{self.bucket}/{key}"

    def create(self, key: str, data: bytes) -> str:
        """Write it if there is none, and return its ETag. Raises ChangedError where there is one."""
        if self.conditions_work():
            return self._put(key, data, IfNoneMatch="*")
        if self.read(key) is not None:
            raise ChangedError
        return self._put_and_look(key, data)

    def replace(self, key: str, data: bytes, etag: str) -> str:
        """Write it if it still is what had that ETag, and return the new one. Raises ChangedError where it is not."""
        if self.conditions_work():
            return self._put(key, data, IfMatch=etag)
        found = self.read(key)
        if found is None or found.etag != etag:
            raise ChangedError
        return self._put_and_look(key, data)

    def put(self, key: str, data: bytes) -> None:
        """Write it, whatever is there."""
        self._put(key, data)

    def read(self, key: str) -> Document | None:
        """The document, or None where there is none. One that is too large is an error."""
        try:
            answer = self.client.get_object(Bucket=self.bucket, Key=key)
            with answer["Body"] as body:
                if answer["ContentLength"] > self._largest:
                    raise RecordError(
                        f"{self.url(key)} has {answer['ContentLength']} bytes, and {self._largest} are the most: "
                        "something else wrote it. Look at it and move it away"
                    )
                data = body.read()
        except (ClientError, BotoCoreError) as error:
            code = s3.error_code(error)
            if code == "NoSuchKey" or (code == "AccessDenied" and self._is_absent(key)):
                return None
            raise self._error("read", key, error) from error
        fields: Any = answer["ResponseMetadata"].get("HTTPHeaders", {})
        age = (_date(fields.get("date")) - answer["LastModified"]).total_seconds()
        return Document(data, answer["ETag"], max(0.0, age))

    def list(self, prefix: str, *, after: str, limit: int) -> tuple[list[str], bool]:
        """At most `limit` keys under `prefix` that come after `after`, in order, and whether there are more."""
        try:
            answer = self._list(prefix, after, limit)
        except (ClientError, BotoCoreError) as error:
            if s3.error_code(error) != "AccessDenied":
                raise self._error("list", f"{prefix}*", error) from error
            raise RecordError(
                f"cannot list {self.url(prefix)}*: the keypair may not do that. Attach the current policy for servers "
                "to it (iam/model-runner*.json, the statement ListPredictions: s3:ListBucket)"
            ) from error
        return [item["Key"] for item in answer.get("Contents", [])], bool(answer.get("IsTruncated"))

    def _list(self, prefix: str, after: str, limit: int) -> Any:
        return self.client.list_objects_v2(
            Bucket=self.bucket, Prefix=prefix, StartAfter=after, MaxKeys=limit
        )

    def _is_absent(self, key: str) -> bool:
        # AWS answers 403 instead of 404 to whoever may list only some prefixes: reading names no prefix, so that the
        # policy's condition is not met. Listing that one key tells them apart.
        try:
            found = self._list(key, "", 1).get("Contents", [])
        except (ClientError, BotoCoreError):
            return False  # the refusal to read is what is reported
        return all(item["Key"] != key for item in found)

    def _put(self, key: str, data: bytes, **condition: Unpack[_Condition]) -> str:
        for attempts_left in reversed(range(ATTEMPTS)):
            try:
                return self._send(key, data, **condition)
            except (ClientError, BotoCoreError) as error:
                code = s3.error_code(error)
                if condition and code in _CHANGED:
                    raise ChangedError from None
                if code != _CONFLICT or not attempts_left:
                    raise self._error("write", key, error) from error
            time.sleep(LONGEST_WAIT_SECONDS * secrets.randbelow(1000) / 1000)
        raise AssertionError("the last attempt returns or raises")

    def _send(self, key: str, data: bytes, **condition: Unpack[_Condition]) -> str:
        answer = self.client.put_object(
            Bucket=self.bucket,
            Key=key,
            Body=data,
            ContentMD5=s3.content_md5(data),
            ContentType="application/json",
            CacheControl="no-store",  # a cache in front of the bucket would tell of an earlier state
            **condition,
        )
        return answer["ETag"]

    def _put_and_look(self, key: str, data: bytes) -> str:
        etag = self._put(key, data)
        found = self.read(key)
        if found is None or found.data != data:
            raise ChangedError
        return etag

    def conditions_work(self) -> bool:
        """Whether the server keeps to If-None-Match and If-Match on writing; asked with two or three PUTs, once."""
        with self._probing:
            if self._conditions_work is None:
                self._conditions_work = self._probe()
                if not self._conditions_work:
                    _log.warning(
                        "the S3 server of bucket %s has no conditional writes (If-None-Match, If-Match): predictions "
                        "are recorded by looking before and after each write, so the same id sent to two replicas at "
                        "one moment may be generated twice; one of the results is kept",
                        self.bucket,
                    )
            return self._conditions_work

    def _probe(self) -> bool:
        # The first replica ever creates it, and is refused the second time.
        there = self._refuses(IfNoneMatch="*") or self._refuses(IfNoneMatch="*")
        return there and self._refuses(IfMatch=_NO_SUCH_ETAG)

    def _refuses(self, **condition: Unpack[_Condition]) -> bool:
        try:
            self._put(self._probe_key, b"", **condition)
        except ChangedError:
            return True
        except RecordError as error:
            cause = error.__cause__
            if isinstance(cause, ClientError) and s3.error_code(cause) in _NO_CONDITIONS:
                return False
            raise
        return False

    def _error(self, verb: str, key: str, error: ClientError | BotoCoreError) -> RecordError:
        return RecordError(f"cannot {verb} {self.url(key)}: {s3.explain(error)}")


def _date(value: str | None) -> datetime:
    """The server's clock; this machine's where the answer has no date."""
    try:
        return parsedate_to_datetime(value or "")
    except ValueError:
        return datetime.now(UTC)
