"""The node cache's folder: who may change it now, what lies in it, and what has to go to make room.

Knows files, sizes and locks; what is in the files, and whether it is right, is the affair of weights/cache.py.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import re
import stat
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

LAYOUT: Final = "v1"
LOCK_NAME: Final = "lock"
LOCK_SECONDS: Final = 10.0  # evicting tens of GB takes about one; past this the holder is stuck
LOCK_PAUSE: Final = 0.005  # seconds between two tries
_ENTRY_FILE = re.compile(r"([0-9a-f]+)\.(data|state)")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StoredEntry:
    """One entry of the folder. `size` is the whole file's, `allocated` what it takes of the disk; both in bytes."""

    content: str
    size: int
    allocated: int
    last_used: int  # nanoseconds since the epoch
    in_use: bool


def entries_to_evict(entries: Iterable[StoredEntry], size: int, limit: int) -> list[str] | None:
    """What must go, least recently used first, for `size` more bytes to fit; None when even that is not enough.

    An entry in use stays, and counts with its full size, since it may still be filled. None evicts nothing: what is
    there is worth more than room that does not suffice.
    """
    idle, taken = [], size
    for entry in entries:
        if entry.in_use:
            taken += entry.size
        else:
            idle.append(entry)
    if taken > limit:
        return None
    idle.sort(key=lambda entry: entry.last_used)
    excess = taken + sum(entry.allocated for entry in idle) - limit
    evicted = []
    for entry in idle:
        if excess <= 0:
            break
        evicted.append(entry.content)
        excess -= entry.allocated
    return evicted


def make_room(directory: int, content: str, size: int, limit: int | None) -> bool:
    """Evict until `size` bytes of `content` fit beside the others, and clear away what crashes left behind.

    False, with nothing evicted, when they cannot. Raises OSError. To be called inside `locked`.
    """
    others = [entry for entry in _stored_entries(directory) if entry.content != content]
    if limit is None:
        return True
    evicted = entries_to_evict(others, size, limit)
    if evicted is None:
        return False
    for name in evicted:
        logger.info("node cache: evicting %s, the least recently used, to make room", name)
        _remove(directory, name)
    return True


def check_folder(folder: Path) -> None:
    """Make the folder, for this user alone, and see that it can be written to and locked. Raises OSError."""
    directory = _open_layout(folder)
    try:
        lock = open_plain(directory, LOCK_NAME)
        try:
            with contextlib.suppress(BlockingIOError):  # held by someone, so locks work
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        finally:
            os.close(lock)
    finally:
        os.close(directory)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[int]:
    """The descriptor of the folder's layout, while no other thread or process admits or evicts.

    Raises OSError, as TimeoutError when another process holds the lock and does not let go of it.
    """
    directory = _open_layout(folder)
    try:
        lock = _lock(directory)
        try:
            yield directory
        finally:
            os.close(lock)
    finally:
        os.close(directory)


def open_plain(directory: int, name: str) -> int:
    """Open `name` for reading and writing, making it when it is not there. Raises OSError.

    Whatever else stands under the name (a link out of the folder, a pipe, a file that has a second name elsewhere)
    is not followed and not written to, but replaced by a file of our own.
    """
    with contextlib.suppress(FileNotFoundError):
        found = os.stat(name, dir_fd=directory, follow_symlinks=False)
        if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
            logger.warning("node cache: %s is not a file of its own, and is replaced", name)
            os.unlink(name, dir_fd=directory)
    return os.open(name, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600, dir_fd=directory)


def _open_layout(folder: Path) -> int:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    layout = folder / LAYOUT
    layout.mkdir(mode=0o700, exist_ok=True)
    return os.open(layout, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)


def _lock(directory: int) -> int:
    deadline = time.monotonic() + LOCK_SECONDS
    while True:
        lock = open_plain(directory, LOCK_NAME)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Someone may have emptied the folder: a lock on a file that is gone holds nobody off.
            if _is_named(lock, directory, LOCK_NAME):
                return lock
        except BlockingIOError:
            pass
        except OSError:
            os.close(lock)
            raise
        os.close(lock)
        if time.monotonic() > deadline:
            raise TimeoutError(
                f"another process has held {LAYOUT}/{LOCK_NAME} for {LOCK_SECONDS:.0f} seconds"
            )
        time.sleep(LOCK_PAUSE)


def _is_named(descriptor: int, directory: int, name: str) -> bool:
    try:
        named = os.stat(name, dir_fd=directory, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return os.path.samestat(os.fstat(descriptor), named)


def _stored_entries(directory: int) -> Iterator[StoredEntry]:
    """Every whole entry; a half one, which a process left that died while making or removing it, is removed."""
    found: dict[str, dict[str, os.stat_result]] = {}
    with os.scandir(directory) as files:
        for file in files:
            match = _ENTRY_FILE.fullmatch(file.name)
            if match and not file.is_dir(follow_symlinks=False):
                content, kind = match.groups()
                found.setdefault(content, {})[kind] = file.stat(follow_symlinks=False)
    for content, kinds in found.items():
        data, state = kinds.get("data"), kinds.get("state")
        in_use = data is not None and _is_in_use(directory, f"{content}.data")
        if data is None or (state is None and not in_use):
            _remove(directory, content)
            continue
        yield StoredEntry(
            content=content,
            size=data.st_size,
            # File systems allocate ahead of what is written, and give that back.
            allocated=min(data.st_blocks * 512, data.st_size),
            last_used=(state or data).st_mtime_ns,
            in_use=in_use,
        )


def _is_in_use(directory: int, name: str) -> bool:
    """Whether anyone, this process included, holds the shared lock that every user of an entry holds."""
    try:
        data = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=directory)
    except OSError:
        return False  # a link, or not a file: nobody reads from that
    try:
        fcntl.flock(data, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(data)
    return False


def _remove(directory: int, content: str) -> None:
    for kind in ("data", "state"):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(f"{content}.{kind}", dir_fd=directory)
