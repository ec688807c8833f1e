"""One entry of the node cache as one process has it open: two files, the chunks that landed, and the claims to others.

Moves bytes and marks what landed. Whether bytes are right, and what to do about a disk that fails, is left to
weights/cache.py; which entries there may be, to weights/cache_eviction.py.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import threading
import time
from typing import Final

from weights.cache_eviction import open_plain
from weights.chunks import CHUNK_SIZE, chunk_count

LANDED: Final = b"\x01"
MISSING: Final = b"\x00"

logger = logging.getLogger(__name__)

# Guards the entries, their users and their claims; never held while a chunk's bytes move.
_guard = threading.Lock()
# By device and inode of the state file. Closing any descriptor of that file would end all of this process's claims
# (fcntl(2)), so a process opens each entry once, whatever the number of caches and files.
_entries: dict[tuple[int, int], Entry] = {}


def open_entry(directory: int, content: str, size: int) -> Entry:
    """This process's one entry for `content`, made and mended as needed, with a user more. Raises OSError.

    Inside `locked`, where nobody evicts: what is opened here is not on its way out.
    """
    with _guard:
        entry = _find_entry(directory, f"{content}.state")
        if entry is None:
            entry = _make_entry(directory, content)
        entry.take(content, size)
        return entry


def _find_entry(directory: int, state_name: str) -> Entry | None:
    try:
        found = os.stat(state_name, dir_fd=directory, follow_symlinks=False)
    except FileNotFoundError:
        return None
    return _entries.get((found.st_dev, found.st_ino))


def _make_entry(directory: int, content: str) -> Entry:
    data = open_plain(directory, f"{content}.data")
    try:
        fcntl.flock(data, fcntl.LOCK_SH | fcntl.LOCK_NB)
        state = open_plain(directory, f"{content}.state")
    except OSError:
        os.close(data)
        raise
    return Entry(data, state)


class Entry:
    """The two files of an entry, opened once in this process.

    `<content>.data` is sparse, with a shared flock on it while anyone has it open. `<content>.state` has a byte a
    chunk, LANDED or not, and its record lock is the claim to the chunk: it excludes other processes and falls when
    this one dies. Within this process `_claims` does.
    """

    def __init__(self, data: int, state: int) -> None:
        self.data = data
        self._users = 0
        self._state = state
        self._claims: dict[int, object] = {}
        self._unmarkable: set[int] = set()
        found = os.fstat(state)
        self._key = (found.st_dev, found.st_ino)
        _entries[self._key] = self

    def take(self, content: str, size: int) -> None:
        """Count one user more, give both files their lengths, and note the use. Under _guard; raises OSError."""
        self._users += 1
        try:
            self._mend(content, size)
            now = time.time_ns()  # the kernel's own "now" is as coarse as its tick, 4 ms
            os.utime(self._state, ns=(now, now))
        except OSError:
            self._put_back()
            raise

    def _mend(self, content: str, size: int) -> None:
        found = os.fstat(self.data).st_size
        if found not in (0, size):
            logger.warning(
                "node cache: %s has %d bytes where %d belong; what is missing is read again",
                content,
                found,
                size,
            )
        if found < size:  # whatever the state says: what lay behind the end is not there
            landed = min(os.fstat(self._state).st_size, found // CHUNK_SIZE)
            os.ftruncate(self._state, landed)
        if found != size:
            os.ftruncate(self.data, size)
        if os.fstat(self._state).st_size != chunk_count(size):
            os.ftruncate(self._state, chunk_count(size))

    def has(self, index: int) -> bool:
        if index < 0 or index in self._unmarkable:
            return False
        try:
            return os.pread(self._state, 1, index) == LANDED
        except OSError:
            return False

    def mark_landed(self, index: int) -> None:
        os.pwrite(self._state, LANDED, index)
        self._unmarkable.discard(index)

    def forget(self, index: int) -> None:
        try:
            os.pwrite(self._state, MISSING, index)
        except OSError:
            self._unmarkable.add(index)  # at least this process asks no more

    def claim(self, index: int, owner: object) -> bool:
        with _guard:
            if index in self._claims:
                return False
            try:
                fcntl.lockf(self._state, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, index)
            except (BlockingIOError, PermissionError):
                return False
            except OSError:
                pass  # out of locks: that two fetch the same chunk costs no more than the fetching
            self._claims[index] = owner
            return True

    def is_claimed(self, index: int, owner: object) -> bool:
        return self._claims.get(index) is owner

    def release(self, index: int, owner: object) -> None:
        with _guard:
            self._release(index, owner)

    def borrow(self) -> None:
        """Keep the descriptors open until one more `put_back`. For those who have the entry already."""
        with _guard:
            self._users += 1

    def put_back(self) -> None:
        with _guard:
            self._put_back()

    def leave(self, owner: object) -> None:
        """`put_back`, with the end of all claims of `owner`."""
        with _guard:
            for index in [index for index, holder in self._claims.items() if holder is owner]:
                self._release(index, owner)
            self._put_back()

    def _put_back(self) -> None:
        self._users -= 1
        if self._users == 0:
            if _entries.get(self._key) is self:
                del _entries[self._key]
            os.close(self.data)
            os.close(self._state)

    def _release(self, index: int, owner: object) -> None:
        if self._claims.get(index) is owner:
            del self._claims[index]
            with contextlib.suppress(OSError):
                fcntl.lockf(self._state, fcntl.LOCK_UN, 1, index)


def _forget_entries_of_the_parent() -> None:
    """A forked process has none of its parent's claims, and perhaps a lock that nobody will release."""
    global _guard, _entries  # noqa: PLW0603
    _guard = threading.Lock()
    _entries = {}


os.register_at_fork(after_in_child=_forget_entries_of_the_parent)


def write(descriptor: int, offset: int, data: memoryview) -> None:
    """All of `data`. Raises OSError, also where a system call takes nothing."""
    while data:
        count = os.pwrite(descriptor, data, offset)
        if not count:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        data = data[count:]
        offset += count
