"""The files of a model in a folder on this disk, such as a container image brings along, read chunk by chunk.

Nothing is trusted because it lies here: whoever reads compares digests, as with bytes from the wire. Which folders are
read from is decided in pulled.py. Light on purpose: a reading process imports it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from pathlib import Path

from weights.chunks import CHUNK_SIZE, SnapshotFile
from weights.errors import FolderError

logger = logging.getLogger(__name__)


def no_bucket_beside(folder: Path) -> FolderError:
    """The error for a chunk that is damaged in `folder`, where no bucket is named to read it from."""
    return FolderError(
        f"the model in {folder} is damaged, and no bucket is named to read the damaged part from. Pull the model into "
        "it again, build the image anew, or set MODEL_BUCKET_NAME"
    )


class ModelFolder:
    """The files under `folder`, each opened when it is first asked for. Safe for many threads."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[str, FolderFile | None] = {}
        self._lock = threading.Lock()

    def open(self, file: SnapshotFile) -> FolderFile | None:
        """The file to read from; None when it cannot be opened, which is said once."""
        with self._lock:
            if file.path not in self._files:
                self._files[file.path] = self._opened(self._folder / file.path)
            return self._files[file.path]

    def close(self) -> None:
        with self._lock:
            for file in self._files.values():
                if file is not None:
                    file.close()
            self._files.clear()

    def _opened(self, path: Path) -> FolderFile | None:
        try:
            return FolderFile(path)
        except OSError as error:
            logger.warning(
                "cannot read %s: %s. It has to come from the bucket", path, error.strerror
            )
            return None


class FolderFile:
    """One file. What `read_at` gives may be wrong: whoever finds that it is says `forget`, and looks elsewhere."""

    def __init__(self, path: Path) -> None:
        """Raises OSError."""
        self._path = path
        # A pipe in its place, which a check of its size has not seen, is not to be waited for.
        self._descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        self._wrong: set[int] = set()

    def has(self, index: int) -> bool:
        """Whether the chunk is worth reading here."""
        return index not in self._wrong

    def read_at(self, index: int, offset: int, into: memoryview) -> int:
        """Read some of the chunk's bytes from `offset` on, and answer how many; 0 where there are none to be had."""
        try:
            return os.preadv(self._descriptor, [into], index * CHUNK_SIZE + offset)
        except OSError as error:
            logger.warning("cannot read %s: %s", self._path, error.strerror)
            return 0

    def forget(self, index: int) -> None:
        """The chunk's bytes here are not the right ones: they are not read again."""
        self._wrong.add(index)
        logger.warning(
            "chunk %d of %s is damaged and has to come from the bucket. Pull the model into that folder again, or "
            "build the image anew",
            index,
            self._path,
        )

    def close(self) -> None:
        with contextlib.suppress(OSError):
            os.close(self._descriptor)
