"""Reading one chunk, whatever the network does: retried when the wire breaks, refused when the bytes are wrong.

The caller brings the memory; nothing here allocates or copies a chunk's bytes.
"""

from __future__ import annotations

import logging
import random
import threading
from collections.abc import Sequence

from weights.bucket import NETWORK_ERRORS, Bucket
from weights.digests import chunk_digest
from weights.errors import BucketError, CorruptObjectError, ObjectChangedError
from weights.snapshot import Chunk, SnapshotFile

ATTEMPTS = 5
CORRUPT_ATTEMPTS = (
    3  # wrong bytes are almost always wrong in the bucket; a few tries tell the wire's own faults
)
FIRST_PAUSE = 0.2  # seconds; doubled after every attempt, with jitter

logger = logging.getLogger(__name__)


class ChunkReader:
    """Reads chunks of one snapshot into given memory and verifies them. Safe to use from many threads."""

    def __init__(self, bucket: Bucket, stopped: threading.Event) -> None:
        self._bucket = bucket
        self._stopped = stopped
        self._etags: dict[str, str] = {}
        self._lock = threading.Lock()

    def read(self, chunk: Chunk, into: Sequence[memoryview]) -> None:
        """Fill `into`, whose lengths add up to the chunk's, with verified bytes.

        Raises CorruptObjectError when the bytes are not the published ones on every attempt, ObjectChangedError
        when the object was replaced, BucketError when it cannot be read.
        """
        for attempt in range(1, ATTEMPTS + 1):
            try:
                self._read_once(chunk, into)
            except ObjectChangedError:
                raise
            except (BucketError, CorruptObjectError, *NETWORK_ERRORS) as error:
                if isinstance(error, BucketError) and error.code:
                    raise  # boto3 has retried the request itself: asking again changes nothing
                if attempt >= (
                    CORRUPT_ATTEMPTS if isinstance(error, CorruptObjectError) else ATTEMPTS
                ):
                    raise _as_room_error(error, self._bucket, chunk) from error
                pause = FIRST_PAUSE * 2 ** (attempt - 1) * random.uniform(0.5, 1.5)
                logger.warning(
                    "%s; reading it again in %.1f s",
                    _as_room_error(error, self._bucket, chunk),
                    pause,
                )
                if self._stopped.wait(pause):
                    raise _as_room_error(error, self._bucket, chunk) from error
            else:
                return

    def _read_once(self, chunk: Chunk, into: Sequence[memoryview]) -> None:
        file = chunk.file
        etag = self._bucket.read_range(
            file.key, chunk.start, into, size=file.size, etag=self._expected_etag(file)
        )
        if chunk.digest is not None and chunk_digest(into) != chunk.digest:
            raise CorruptObjectError(
                f"{self._bucket.url(file.key)} is corrupt: bytes {chunk.start} to {chunk.start + chunk.length - 1} "
                "are not the bytes that were published (their BLAKE3 differs). Publish the model again with "
                "prepare_model.py --repair, which sends every file anew, or go back to an earlier version with "
                "`python -m weights activate`"
            )
        # Only now: the ETag of a stale answer, from a cache that was wrong once, must not decide about the others.
        self._remember_etag(file, etag)

    def _expected_etag(self, file: SnapshotFile) -> str | None:
        return file.etag or self._etags.get(file.key)

    def _remember_etag(self, file: SnapshotFile, etag: str) -> None:
        with self._lock:
            first = self._etags.setdefault(file.key, etag)
        if first != etag:
            raise ObjectChangedError(
                f"{self._bucket.url(file.key)} was replaced while it was read (ETag {etag}, before {first}). "
                "Load again"
            )


def _as_room_error(error: Exception, bucket: Bucket, chunk: Chunk) -> Exception:
    if isinstance(error, (BucketError, CorruptObjectError)):
        return error
    last = chunk.start + chunk.length - 1
    return BucketError(
        f"cannot read {bucket.url(chunk.file.key)}, bytes {chunk.start} to {last}: the connection broke "
        f"({type(error).__name__}: {error}). Try again; if it stays, check the network between here and the bucket"
    )
