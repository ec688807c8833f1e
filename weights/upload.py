"""Sending one file of a version: whole when it is small, in parts when it is not, each part checked as it leaves.

A part is compared with the manifest's chunk digests before it is sent and carries a Content-MD5 the server checks
on arrival, so what lies in the bucket afterwards is what was hashed.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from boto3.s3.transfer import TransferConfig

from s3 import content_md5
from weights.bucket import Bucket
from weights.chunks import CHUNK_SIZE
from weights.digests import Progress, chunk_digest
from weights.errors import BucketError, FolderError
from weights.manifest import FileEntry

if TYPE_CHECKING:
    from mypy_boto3_s3.type_defs import CompletedPartTypeDef

PART_SIZE = 2 * CHUNK_SIZE  # bytes; at S3's limit of 10,000 parts that allows files of 335 GB
SHA256_METADATA = (
    "sha256"  # on every published object: tells what is already there, here and to other tools
)
_COPY_IN_ONE = 4 * 1024**3  # bytes; S3 copies up to 5 GiB in one request


class FileUpload:
    """One file on its way to one key. `begin`, then run every task of `tasks` in any order, then `complete`."""

    def __init__(
        self, bucket: Bucket, file: Path, key: str, entry: FileEntry, on_bytes: Progress | None
    ) -> None:
        self._bucket = bucket
        self._file = file
        self._key = key
        self._entry = entry
        self._on_bytes = on_bytes
        self._upload_id: str | None = None
        self._parts: dict[int, str] = {}

    def begin(self) -> None:
        if self._entry.size <= PART_SIZE:
            return
        with self._bucket.explained("write", self._key):
            answer = self._bucket.client.create_multipart_upload(
                Bucket=self._bucket.name,
                Key=self._key,
                ContentType=content_type(self._key),
                Metadata={SHA256_METADATA: self._entry.sha256},
            )
        self._upload_id = answer["UploadId"]

    def tasks(self) -> Iterator[Callable[[], None]]:
        if self._upload_id is None:
            yield self._put_whole
        else:
            for number in range(1, -(-self._entry.size // PART_SIZE) + 1):
                yield partial(self._put_part, number)

    def complete(self) -> None:
        if self._upload_id is None:
            return
        parts: list[CompletedPartTypeDef] = [
            {"PartNumber": number, "ETag": self._parts[number]} for number in sorted(self._parts)
        ]
        with self._bucket.explained("write", self._key):
            self._bucket.client.complete_multipart_upload(
                Bucket=self._bucket.name,
                Key=self._key,
                UploadId=self._upload_id,
                MultipartUpload={"Parts": parts},
            )
        self._upload_id = None

    def abort(self) -> None:
        """Leave no parts behind; a no-op once complete. Raises BucketError when the bucket refuses even that."""
        if self._upload_id is None:
            return
        with self._bucket.explained("clean up the unfinished upload of", self._key):
            self._bucket.client.abort_multipart_upload(
                Bucket=self._bucket.name, Key=self._key, UploadId=self._upload_id
            )
        self._upload_id = None

    def _put_whole(self) -> None:
        data = self._verified_bytes(0, self._entry.size)
        with self._bucket.explained("write", self._key):
            self._bucket.client.put_object(
                Bucket=self._bucket.name,
                Key=self._key,
                Body=data,
                ContentType=content_type(self._key),
                ContentMD5=content_md5(data),
                Metadata={SHA256_METADATA: self._entry.sha256},
            )
        self._sent(len(data))

    def _put_part(self, number: int) -> None:
        start = (number - 1) * PART_SIZE
        data = self._verified_bytes(start, min(PART_SIZE, self._entry.size - start))
        assert self._upload_id is not None  # noqa: S101 - parts exist only of an upload that began
        with self._bucket.explained(f"write part {number} of", self._key):
            answer = self._bucket.client.upload_part(
                Bucket=self._bucket.name,
                Key=self._key,
                UploadId=self._upload_id,
                PartNumber=number,
                Body=data,
                ContentMD5=content_md5(data),
            )
        self._parts[number] = answer["ETag"]
        self._sent(len(data))

    def _verified_bytes(self, start: int, length: int) -> bytes:
        """Read a part of the file, `start` on a chunk's border, and make sure it is still what was hashed."""
        try:
            with self._file.open("rb", buffering=0) as source:
                source.seek(start)
                data = _read_exactly(source, length)
        except OSError as error:
            raise FolderError(f"cannot read {self._file}: {error.strerror}") from error
        first = start // CHUNK_SIZE
        view = memoryview(data)
        digests = [
            chunk_digest([view[offset : offset + CHUNK_SIZE]])
            for offset in range(0, length, CHUNK_SIZE)
        ]
        if len(data) != length or digests != list(self._entry.chunks[first : first + len(digests)]):
            raise FolderError(
                f"{self._file} changed while it was being published. Run it again when the folder is quiet"
            )
        return data

    def _sent(self, count: int) -> None:
        if self._on_bytes:
            self._on_bytes(count)


def _read_exactly(source: io.RawIOBase, length: int) -> bytes:
    """As many bytes as there are up to `length`: network file systems give fewer at a time."""
    parts = []
    while length and (part := source.read(length)):
        parts.append(part)
        length -= len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def copy_within(bucket: Bucket, source_key: str, key: str, entry: FileEntry) -> None:
    """Have the bucket itself copy an object it already holds, in parts when it is large. Raises BucketError."""
    with bucket.explained(f"copy {bucket.url(source_key)} to", key):
        bucket.client.copy(
            {"Bucket": bucket.name, "Key": source_key},
            bucket.name,
            key,
            ExtraArgs={
                "Metadata": {SHA256_METADATA: entry.sha256},
                "MetadataDirective": "REPLACE",
                "ContentType": content_type(key),
            },
            Config=TransferConfig(
                multipart_threshold=_COPY_IN_ONE, multipart_chunksize=_COPY_IN_ONE // 4
            ),
        )


def is_there(bucket: Bucket, key: str, entry: FileEntry) -> bool:
    """Whether the object is the entry's file, by its size and the SHA-256 it was published with."""
    try:
        with bucket.explained("look at", key):
            found = bucket.client.head_object(Bucket=bucket.name, Key=key)
    except BucketError as error:
        if error.is_missing_or_hidden:
            return False
        raise
    # Servers written in Go give the name back as Sha256.
    metadata = {name.lower(): value for name, value in found.get("Metadata", {}).items()}
    return (
        found.get("ContentLength") == entry.size and metadata.get(SHA256_METADATA) == entry.sha256
    )


def content_type(key: str) -> str:
    """The media type objects are stored with, so that a browser or another tool treats them sensibly."""
    if key.endswith(".json"):
        return "application/json"
    return "text/plain; charset=utf-8" if key.endswith(".txt") else "application/octet-stream"
