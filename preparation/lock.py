"""One run at a time on a prepared folder. The kernel holds the lock, so it ends with its process, however that ends."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from preparation.errors import PreparationError


@contextmanager
def claim(folder: Path) -> Iterator[None]:
    """Keep every other run away from `folder` and what is built beside it.

    Raises:
        PreparationError: another run has it, or the disk refuses.
    """
    lock = folder.with_name(f"{folder.name}.lock")
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        descriptor = _acquire(lock)
    except BlockingIOError as error:
        raise PreparationError(
            f"Another run is preparing this model in {folder}; wait for it or choose another --destdir."
        ) from error
    except OSError as error:
        raise PreparationError(
            f"Locking {lock}: {error.strerror or error}. Check the folder and its permissions, or choose another "
            "--destdir."
        ) from error
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)
        os.close(descriptor)


def _acquire(lock: Path) -> int:
    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(descriptor, lock):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(
            descriptor
        )  # who held it has just removed it: whoever comes next would make another


def _is_at(descriptor: int, lock: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), lock.stat())
    except FileNotFoundError:
        return False
