"""A cache of model files on a node's own disk, shared by every process there and filled as a by-product of reading.

An entry is named after its content and holds whichever chunks have landed. What a bucket is, and when to ask one, is
left to others. Nothing is trusted because it lies here: every read is verified, which is also why nothing is ever
fsynced. A chunk that a power failure took is a chunk that is not there.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from weights.cache_entry import Entry, open_entry, write
from weights.cache_eviction import LAYOUT, check_folder, locked, make_room
from weights.chunks import CHUNK_SIZE, chunk_count
from weights.errors import FolderError

_CONTENT = re.compile(r"[0-9a-f]{16,128}")

logger = logging.getLogger(__name__)


class NodeCache:
    """The cache in `folder`, for any number of threads and processes. Holds at most `limit_bytes` of files, if given.

    Entries give way to new ones, least recently opened first, but never while any process has them open. One that is
    open counts with its full size, one that is not with the disk it takes.
    """

    def __init__(self, folder: Path, limit_bytes: int | None) -> None:
        """Make the folder, readable by this user alone. Raises FolderError when it cannot be used."""
        self._folder = folder
        self._limit = limit_bytes
        self._disk = _Disk(folder)
        try:
            check_folder(folder)
        except OSError as error:
            raise FolderError(
                f"cannot keep weights in the node cache {folder}: {_reason(error)}. Name a folder on a local disk "
                "that this user may write to, or leave the node cache switched off"
            ) from error

    def open(self, content: str, size: int, digests: Sequence[str]) -> CachedFile | None:
        """The entry of the file of `size` bytes that `content`, a hexadecimal digest of it, names; to be closed.

        `digests` are the BLAKE3s of its chunks, against which every read is checked. None when it does not fit under
        the limit beside what is in use, when the folder has become unusable (both said once a cache), and for an
        empty file. Raises ValueError for a name that is none, or digests that do not go with the size.
        """
        if not _CONTENT.fullmatch(content):
            raise ValueError(f"{content!r} is not a digest in lower-case hexadecimal")
        if len(digests) != chunk_count(size):
            raise ValueError(
                f"{content} has {len(digests)} chunk digests where {size} bytes need {chunk_count(size)}"
            )
        if size == 0:
            return None
        try:
            # The caller's own size decides before anything is locked or scanned.
            if self._limit is None or size <= self._limit:
                with locked(self._folder) as directory:
                    if make_room(directory, content, size, self._limit):
                        entry = open_entry(directory, content, size)
                        path = self._folder / LAYOUT / f"{content}.data"
                        return CachedFile(entry, path, size, digests, self._disk)
        except OSError as error:
            self._disk.warn_once(
                f"{_reason(error)}; files are read from the bucket every time. Check that folder"
            )
            return None
        self._disk.warn_once(
            f"{content}, {size / 1e9:.3g} GB, does not fit under the limit of {(self._limit or 0) / 1e9:.3g} GB "
            "beside what is in use, and is read from the bucket every time. Raise the limit to keep it"
        )
        return None


class CachedFile:
    """One file of the cache, safe for many threads and processes; a process that was forked opens its own.

    Chunks are CHUNK_SIZE bytes, the last one short; the buffers of one call are flat bytes whose lengths add up to
    the chunk's, else ValueError. After `close` every answer is False.
    """

    def __init__(
        self, entry: Entry, path: Path, size: int, digests: Sequence[str], disk: _Disk
    ) -> None:
        self._entry = entry
        self._path = path
        self._size = size
        self._digests = digests
        self._disk = disk
        self._closed = False
        self._lock = threading.Lock()  # of `_closed`; never held while bytes move

    def has(self, index: int) -> bool:
        """Whether the chunk is on this disk; what it is worth, only `read` can tell."""
        with self._borrowed() as entry:
            return entry is not None and entry.has(index)

    def read_at(self, index: int, offset: int, into: memoryview) -> int:
        """Read some of the chunk's bytes from `offset` on, and answer how many; 0 where there are none to be had.

        They may be wrong: a disk forgets, and a process may have been killed while writing. Whoever reads compares the
        chunk's digest, and says `forget` when it differs.
        """
        with self._borrowed() as entry:
            if entry is None:
                return 0
            try:
                return os.preadv(entry.data, [into], index * CHUNK_SIZE + offset)
            except OSError as error:
                logger.warning("node cache: cannot read %s: %s", self._path, _reason(error))
                return 0

    def forget(self, index: int) -> None:
        """The chunk's bytes here are not the right ones: it can be claimed and written again."""
        with self._borrowed() as entry:
            if entry is not None:
                entry.forget(index)
        logger.warning(
            "node cache: chunk %d of %s is damaged, and will be read from the bucket again",
            index,
            self._path,
        )

    def claim(self, index: int) -> bool:
        """Whether this object is from now on the one, of all on this node, that fetches the chunk; never waits.

        False while another fetches it, and when it has landed meanwhile (see `has`). A claim ends with `fill`,
        `release` or `close`, and with the process, however it dies.
        """
        with self._borrowed() as entry:
            if entry is None or not entry.claim(index, self):
                return False
            if entry.has(index):
                entry.release(index, self)
                return False
            return True

    def write_at(self, index: int, offset: int, data: memoryview) -> None:
        """Write some bytes of a claimed chunk as they arrive; nobody reads them before `complete`.

        Does nothing for a chunk that is not claimed. A disk that does not take them is said once a cache, and ends
        the claim: this process then leaves the cache as it is.
        """
        with self._borrowed() as entry:
            if entry is None or not entry.is_claimed(index, self):
                return
            try:
                if self._disk.takes_more:
                    write(entry.data, index * CHUNK_SIZE + offset, data)
                    return
            except OSError as error:
                self._disk.stop_filling(error)
            entry.release(index, self)

    def complete(self, index: int) -> bool:
        """All of a claimed chunk has been written, and its bytes verified: let everybody see it, and end the claim.

        False, and nothing done, when it is not claimed any more, since the disk did not take all of it.
        """
        with self._borrowed() as entry:
            if entry is None or not entry.is_claimed(index, self):
                return False
            try:
                # Only now: a process killed before this line leaves a chunk that is not there.
                entry.mark_landed(index)
            except OSError as error:
                self._disk.stop_filling(error)
                return False
            finally:
                entry.release(index, self)
            return True

    def release(self, index: int) -> None:
        """End the claim to a chunk without filling it. Harmless when there is none."""
        with self._borrowed() as entry:
            if entry is not None:
                entry.release(index, self)

    def close(self) -> None:
        """Let go of the entry and of all claims made here. Harmless the second time, and while threads are reading."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._entry.leave(self)

    @contextlib.contextmanager
    def _borrowed(self) -> Iterator[Entry | None]:
        """The entry, whose descriptors stay open meanwhile; None after `close`."""
        with self._lock:
            entry = None if self._closed else self._entry
            if entry is not None:
                entry.borrow()
        try:
            yield entry
        finally:
            if entry is not None:
                entry.put_back()


class _Disk:
    """What one cache has learned of its disk: whether it still takes bytes, and what was said about it."""

    def __init__(self, folder: Path) -> None:
        self.takes_more = True
        self._folder = folder
        self._warned = False
        self._lock = threading.Lock()

    def stop_filling(self, error: OSError) -> None:
        with self._lock:
            first, self.takes_more = self.takes_more, False
        if first:
            logger.warning(
                "node cache: cannot write to %s: %s. It is no longer filled by this process, and loading goes on "
                "from the bucket. Make room there, or lower the cache's limit",
                self._folder,
                _reason(error),
            )

    def warn_once(self, problem: str) -> None:
        with self._lock:
            first, self._warned = not self._warned, True
        if first:
            logger.warning("node cache %s: %s", self._folder, problem)


def _reason(error: OSError) -> str:
    return error.strerror or str(error)
