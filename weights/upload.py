"""Sending one file of a version: whole when it is small, in parts when it is not, each part checked as it leaves.

As it leaves, a part is compared with the manifest's chunk digests. It is signed with its SHA-256, which the server
checks on arrival, so what lies in the bucket afterwards is what was hashed. A Content-MD5 would have botocore leave the
SHA-256 out over TLS, and takes longer (0.8 GB/s a core where SHA instructions give 1.9). Parts that are there already
are not sent again.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from boto3.s3.transfer import TransferConfig

from weights.bucket import Bucket
from weights.digests import PART_SIZE, Progress
from weights.errors import BucketError
from weights.manifest import FileEntry
from weights.part import FilePart
from weights.unfinished import HeldPart, Resumption, abort_upload

if TYPE_CHECKING:
    from mypy_boto3_s3.type_defs import CompletedPartTypeDef

SHA256_METADATA = (
    "sha256"  # on every published object: tells what is already there, here and to other tools
)
_COPY_IN_ONE = 4 * 1024**3  # bytes; S3 copies up to 5 GiB in one request
_BEGINNINGS = 3  # of one file's upload, which somebody else may abort or complete under our hands
_NOT_OURS_ANY_MORE = frozenset({"NoSuchUpload", "InvalidPart"})


@dataclass
class _Multipart:
    """An upload that has begun. `held` is what the server had of it when this run took it up."""

    upload_id: str
    taken_up: bool
    held: Mapping[int, HeldPart]
    etags: dict[int, str] = field(default_factory=dict)


class FileUpload:
    """One file on its way to one key. Run every task of `tasks`, in any order, on any threads: the last completes it.

    Another run may be sending the same bytes to the same key, and may have taken up the same unfinished upload:
    whichever completes first has done it for both. `digests` are the parts' SHA-256s, where they are known.
    """

    def __init__(
        self,
        bucket: Bucket,
        file: Path,
        key: str,
        entry: FileEntry,
        resumption: Resumption,
        on_bytes: Progress | None = None,
        digests: Sequence[str] | None = None,
    ) -> None:
        self._bucket = bucket
        self._file = file
        self._key = key
        self._entry = entry
        self._resumption = resumption
        self._on_bytes = on_bytes
        self._digests = digests
        self._numbers = range(1, -(-entry.size // PART_SIZE) + 1)
        self._lock = threading.Lock()
        self._left = len(self._numbers)
        self._beginnings = 0
        self._multipart: _Multipart | None = None
        self._whole = False

    def tasks(self) -> Iterator[Callable[[], None]]:
        if self._entry.size <= PART_SIZE:
            yield self._put_whole
        else:
            for number in self._numbers:
                yield partial(self._part_task, number)

    def abort(self) -> None:
        """Leave no part of this run's own behind. Raises BucketError when the bucket refuses even that."""
        multipart = self._multipart
        if multipart is not None and not multipart.taken_up and not self._whole:
            abort_upload(self._bucket, self._key, multipart.upload_id)

    def _put_whole(self) -> None:
        with FilePart(self._file, self._entry) as part, self._bucket.explained("write", self._key):
            self._bucket.client.put_object(
                Bucket=self._bucket.name,
                Key=self._key,
                Body=_body(part),
                ContentType=content_type(self._key),
                Metadata={SHA256_METADATA: self._entry.sha256},
            )
        self._sent(self._entry.size)

    def _part_task(self, number: int) -> None:
        self._sent(self._send_part(number))
        with self._lock:
            self._left -= 1
            is_last = self._left == 0
        if is_last:
            self._complete()

    def _send_part(self, number: int) -> int:
        """Have the server hold the part, and return its size in bytes."""
        digest = self._digests[number - 1] if self._digests else None
        with FilePart(self._file, self._entry, number, digest) as part:
            while not self._whole:
                multipart = self._begun()
                held = multipart.held.get(number)
                if held is not None and held.size == len(part) and held.etag == part.md5():
                    multipart.etags[number] = held.etag
                    break
                try:
                    with self._bucket.explained(f"write part {number} of", self._key):
                        answer = self._bucket.client.upload_part(
                            Bucket=self._bucket.name,
                            Key=self._key,
                            UploadId=multipart.upload_id,
                            PartNumber=number,
                            Body=_body(part),
                        )
                except BucketError as error:
                    self._recover(multipart, error)
                    part.seek(0)
                    continue
                multipart.etags[number] = answer["ETag"]
                break
            return len(part)

    def _complete(self) -> None:
        while not self._whole:
            multipart = self._begun()
            for number in self._numbers:
                if number not in multipart.etags:  # sent to an upload that is gone
                    self._send_part(number)
            if multipart is not self._multipart:
                continue
            parts: list[CompletedPartTypeDef] = [
                {"PartNumber": number, "ETag": multipart.etags[number]} for number in self._numbers
            ]
            try:
                with self._bucket.explained("write", self._key):
                    self._bucket.client.complete_multipart_upload(
                        Bucket=self._bucket.name,
                        Key=self._key,
                        UploadId=multipart.upload_id,
                        MultipartUpload={"Parts": parts},
                    )
            except BucketError as error:
                self._recover(multipart, error)
                continue
            # What another tool began lacks the SHA-256, by which a later run would know the object.
            if multipart.taken_up and not is_there(self._bucket, self._key, self._entry):
                self._multipart = None
                continue
            self._whole = True

    def _begun(self) -> _Multipart:
        """The upload to send to: what an earlier run left, or a new one."""
        with self._lock:
            if self._multipart is None:
                self._multipart = self._take_up() or self._create()
                self._beginnings += 1
            return self._multipart

    def _take_up(self) -> _Multipart | None:
        if self._beginnings or (found := self._resumption.find(self._key)) is None:
            return None
        upload, held = found
        return _Multipart(upload.upload_id, True, held)

    def _create(self) -> _Multipart:
        with self._bucket.explained("write", self._key):
            answer = self._bucket.client.create_multipart_upload(
                Bucket=self._bucket.name,
                Key=self._key,
                ContentType=content_type(self._key),
                Metadata={SHA256_METADATA: self._entry.sha256},
            )
        return _Multipart(answer["UploadId"], False, {})

    def _recover(self, multipart: _Multipart, error: BucketError) -> None:
        """Go on after `multipart` is gone: somebody completed it, or aborted it. Raises `error` for anything else."""
        if error.code not in _NOT_OURS_ANY_MORE:
            raise error
        with self._lock:
            if multipart is not self._multipart:
                return  # another thread has been here
            if is_there(self._bucket, self._key, self._entry):
                self._whole = True
            elif self._beginnings == _BEGINNINGS:
                raise error
            else:
                self._multipart = None

    def _sent(self, count: int) -> None:
        if self._on_bytes:
            self._on_bytes(count)


def _body(part: FilePart) -> Any:
    """botocore reads and rewinds what it sends, and asks for no more, though its types do."""
    return part


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
