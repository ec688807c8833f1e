"""Objects of a bucket on this disk: read in ranges, many at once, and taken up where an earlier run was.

A file is kept under a name made of its key and of what tells its bytes apart (a digest, or its ETag), so an object that
was overwritten since is another file. Beside it, a line each, lie the BLAKE3s of its 16 MiB chunks as they landed: by
these an interrupted download goes on, and a file that was damaged on this disk is found out.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from preparation.errors import PreparationError
from preparation.origin import OnBytes
from preparation.parallel import for_each
from weights.chunk_reader import ChunkReader
from weights.chunks import Chunk, SnapshotFile
from weights.digests import chunk_digest
from weights.errors import WeightsError
from weights.remembered import Remembered

_LINE = re.compile(r"(\d{1,9}) ([0-9a-f]{64})")
_READABLE = 60  # characters of a file's own name in the name it is kept under

Explained = Callable[[SnapshotFile, WeightsError], Exception]


@dataclass(frozen=True)
class Blob:
    """Where one object lies on this disk once it is whole (`place`), and until then (`part`)."""

    file: SnapshotFile
    place: Path

    @property
    def part(self) -> Path:
        return self.place.with_name(f"{self.place.name}.part")

    @property
    def log(self) -> Path:
        return self.place.with_name(f"{self.place.name}.blake3")

    @property
    def is_here(self) -> bool:
        return self.place.is_file() and self.place.stat().st_size == self.file.size


def blob_of(file: SnapshotFile, folder: Path, server: str) -> Blob:
    """Where `file` of a bucket on `server` is kept in `folder`, the bucket's own."""
    identity = json.dumps([server, file.key, file.content or file.etag, file.size])
    digest = hashlib.sha256(identity.encode()).hexdigest()[:24]
    readable = re.sub(r"[^A-Za-z0-9._-]", "_", file.path.rpartition("/")[2])[-_READABLE:]
    return Blob(file, folder / f"{digest}-{readable}")


def download(
    blobs: Iterable[Blob], reading: ChunkReader, *, on_bytes: OnBytes, explained: Explained
) -> None:
    """Bring the objects here. Each takes its own name once it is whole and on the disk.

    `explained` turns what reading an object raised into words. Raises that, and OSError.
    """
    with ExitStack() as stack:
        parts: dict[SnapshotFile, _Part] = {}
        for blob in blobs:
            part = stack.enter_context(_opened(blob))
            if part.missing:
                parts[blob.file] = part

        def bring(chunk: Chunk) -> None:
            try:
                data = reading.read(chunk)
            except WeightsError as error:
                raise explained(chunk.file, error) from error
            if reading.stopped.is_set():
                return  # what was read may be less than the chunk
            parts[chunk.file].write(chunk, data)
            on_bytes(chunk.length)

        reading.each([chunk for part in parts.values() for chunk in part.missing.values()], bring)


def check(blobs: Iterable[Blob], *, jobs: int, on_bytes: OnBytes, remembered: Remembered) -> None:
    """Read the files again and compare them with the digests that were written down as they landed.

    All their digests go into `remembered`. Raises PreparationError, naming a file that is not what it was.
    """
    for_each(blobs, lambda blob: _check(blob, on_bytes, remembered), jobs=jobs)


def _check(blob: Blob, on_bytes: OnBytes, remembered: Remembered) -> None:
    logged = _logged(blob)
    expected = [chunk.digest or logged.get(chunk.index) for chunk in blob.file.chunks()]
    if list(remembered.read(blob.place, on_bytes).chunks) != expected:
        raise PreparationError(
            f"{blob.file.path} is damaged on this disk: it is not what was downloaded. Delete {blob.place} "
            "and run the same command again."
        )


def _logged(blob: Blob) -> Mapping[int, str]:
    """Chunks that have landed, by index. A line that a killed run left half-written counts for nothing."""
    try:
        text = blob.log.read_text("ascii", errors="replace")
    except FileNotFoundError:
        return {}
    found = {}
    for line in text.splitlines():
        if match := _LINE.fullmatch(line):
            found[int(match[1])] = match[2]
    return found


class _Part:
    """A file that is being put together. Safe to use from many threads."""

    def __init__(self, blob: Blob, descriptor: int, here: Mapping[int, str]) -> None:
        self.missing = {
            chunk.index: chunk for chunk in blob.file.chunks() if chunk.index not in here
        }
        self._blob = blob
        self._descriptor = descriptor
        self._left = set(self.missing)
        self._log = blob.log.open("w", encoding="ascii")
        self._log.writelines(f"{index} {digest}\n" for index, digest in here.items())
        self._log.flush()
        self._lock = threading.Lock()
        self._is_open = True
        if not self._left:
            self._finish()

    def write(self, chunk: Chunk, data: memoryview) -> None:
        """Put the chunk in its place and note it down; the last one makes the file whole."""
        digest = chunk.digest or chunk_digest([data])
        with self._lock:
            if not self._is_open:
                return  # interrupted: the file is no longer ours to write
            _write_all(self._descriptor, data, chunk.start)
            self._log.write(f"{chunk.index} {digest}\n")
            self._log.flush()
            self._left.remove(chunk.index)
            if not self._left:
                self._finish()

    def close(self) -> None:
        with self._lock:
            self._is_open = False
            self._log.close()

    def _finish(self) -> None:
        os.fsync(self._descriptor)
        os.fsync(self._log.fileno())
        self._blob.part.replace(self._blob.place)


@contextmanager
def _opened(blob: Blob) -> Iterator[_Part]:
    blob.part.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(blob.part, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        os.truncate(descriptor, blob.file.size)
        part = _Part(blob, descriptor, dict(_still_right(blob, descriptor)))
        try:
            yield part
        finally:
            part.close()
    finally:
        os.close(descriptor)


def _still_right(blob: Blob, descriptor: int) -> Iterator[tuple[int, str]]:
    """The chunks that an earlier run has brought: a machine that lost power may have noted more than it wrote."""
    logged = _logged(blob)
    for chunk in blob.file.chunks():
        digest = logged.get(chunk.index)
        if digest is None or digest != (chunk.digest or digest):
            continue
        if chunk_digest([os.pread(descriptor, chunk.length, chunk.start)]) == digest:
            yield chunk.index, digest


def _write_all(descriptor: int, data: memoryview, position: int) -> None:
    while data:
        count = os.pwrite(descriptor, data, position)
        data = data[count:]
        position += count
