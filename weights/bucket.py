"""One bucket, as this room uses it: read through the room's own reader, written and listed through boto3.

Every failure leaves here as a `BucketError` that names the object, what was being done and what to try.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, TypedDict

from s3 import connect, content_md5, error_code, explain
from weights.errors import BucketError
from weights.objects import UNREACHABLE, ObjectReader

if TYPE_CHECKING:
    from datetime import datetime

    from mypy_boto3_s3 import S3Client

    from settings import StorageSettings
    from weights.transport import Patience


class _Condition(TypedDict, total=False):
    IfMatch: str
    IfNoneMatch: str


@dataclass(frozen=True)
class ObjectInfo:
    """What a listing says of an object; `etag` without its quotes."""

    key: str
    size: int
    etag: str
    modified: datetime


class Bucket:
    """A bucket by name. Safe to use from many threads.

    What is read goes over `reader`; the boto3 client, which takes a second to come about, is made when something is
    written, listed or copied for the first time, for at most `connections` calls at once.
    """

    def __init__(
        self,
        settings: StorageSettings,
        name: str,
        *,
        connections: int = 32,
        patience: Patience | None = None,
    ) -> None:
        self.name = name
        self._patience = patience
        self._settings = settings
        self._connections = connections

    def as_plain(self) -> dict[str, Any]:
        """Plain values that `from_plain` makes the same bucket of in another process, secrets included."""
        return {
            "name": self.name,
            "patience": None if self._patience is None else asdict(self._patience),
            "settings": self._settings.plain_storage(),
        }

    @staticmethod
    def from_plain(values: dict[str, Any]) -> Bucket:
        from settings import StorageSettings
        from weights.transport import Patience

        patience = values["patience"]
        return Bucket(
            StorageSettings(**values["settings"]),
            values["name"],
            patience=None if patience is None else Patience(**patience),
        )

    @functools.cached_property
    def client(self) -> S3Client:
        """boto3's client. Raises SettingsError for an AWS profile that is not there."""
        return connect(self._settings, connections=self._connections)

    @functools.cached_property
    def reader(self) -> ObjectReader:
        """Raises SettingsError, and BucketError where there are no credentials."""
        return ObjectReader.from_settings(self._settings, self.name, self._patience)

    def url(self, key: str) -> str:
        """The object's name for people: s3://bucket/key."""
        return f"s3://{self.name}/{key}"

    def get(self, key: str, *, limit: int) -> bytes:
        """Read a small object whole, again if the answer breaks off.

        Raises BucketError, and OversizedError when it has more than `limit` bytes.
        """
        return self.reader.get(key, limit=limit)

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

    def folders(self, prefix: str) -> tuple[str, ...]:
        """The names of what looks like a folder under `prefix`, which ends with a slash. Raises BucketError."""
        with self.explained("list", f"{prefix}*"):
            pages = self.client.get_paginator("list_objects_v2").paginate(
                Bucket=self.name, Prefix=prefix, Delimiter="/"
            )
            found = [place["Prefix"] for page in pages for place in page.get("CommonPrefixes", [])]
        return tuple(place.removeprefix(prefix).rstrip("/") for place in found)

    def size(self, key: str) -> int | None:
        """The object's size in bytes; None when there is none to be seen. Raises BucketError."""
        try:
            with self.explained("look at", key):
                return self.client.head_object(Bucket=self.name, Key=key)["ContentLength"]
        except BucketError as error:
            if error.is_missing_or_hidden:
                return None
            raise

    def put(
        self, key: str, data: bytes, *, content_type: str, only_over: str | None = None
    ) -> None:
        """Write a small object whole; the server refuses it if the bytes do not arrive as sent.

        With `only_over`, an ETag, it is written only in the place of that object, and with "" only where there is
        none: a BucketError "PreconditionFailed" says that it was not. Servers that know no conditions write it.
        """
        condition: _Condition = {}
        if only_over == "":
            condition = {"IfNoneMatch": "*"}
        elif only_over is not None:
            condition = {"IfMatch": f'"{only_over}"'}
        with self.explained("write", key):
            self.client.put_object(
                Bucket=self.name,
                Key=key,
                Body=data,
                ContentType=content_type,
                ContentMD5=content_md5(data),
                **condition,
            )

    def delete(self, key: str) -> None:
        """Delete one object; none there is as good. Raises BucketError."""
        with self.explained("delete", key):
            self.client.delete_object(Bucket=self.name, Key=key)

    @contextlib.contextmanager
    def explained(self, doing: str, key: str) -> Iterator[None]:
        """Turn what boto3 or the connection raises into a BucketError about this object."""
        from botocore import exceptions as botocore_errors
        from urllib3 import exceptions as urllib3_errors

        try:
            yield
        except botocore_errors.ClientError as error:
            raise BucketError(
                f"cannot {doing} {self.url(key)}: {explain(error)}", error_code(error)
            ) from error
        except (botocore_errors.BotoCoreError, urllib3_errors.HTTPError, OSError) as error:
            raise BucketError(
                f"cannot {doing} {self.url(key)}: {explain(error)}", UNREACHABLE
            ) from error
