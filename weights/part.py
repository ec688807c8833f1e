"""One part of a file as the body of a request: read as it is sent, and only ever sent whole as what was hashed.

The last block of a chunk leaves once the chunk's BLAKE3 is found right, so that of anything else a server gets no more
than a beginning. It takes the memory of one block, and knows nothing of buckets.
"""

from __future__ import annotations

import hashlib
from concurrent.futures import CancelledError
from typing import TYPE_CHECKING, Self

from blake3 import blake3

from weights.chunks import CHUNK_SIZE
from weights.digests import PART_SIZE, read_block
from weights.errors import FolderError

if TYPE_CHECKING:
    from hashlib import _Hash
    from pathlib import Path

    from weights.manifest import FileEntry

# Bytes that are read, compared and sent at once. With a quarter of that, eight threads in turn for the interpreter took
# 7 % longer, and hashing would not gain.
BLOCK_SIZE = 1024 * 1024


class UnreadablePartError(FolderError, CancelledError):
    """A file is not what was hashed, or cannot be read. After anything but a CancelledError botocore tries again."""


class FilePart:
    """Part `number`, counted from 1, of the file that `entry` describes: a body that botocore can read and rewind.

    `sha256`, in hexadecimal, is what the request is signed with; it is computed when it is asked for and not known.
    To be used as a context; everything that reads raises UnreadablePartError.
    """

    def __init__(
        self, file: Path, entry: FileEntry, number: int = 1, sha256: str | None = None
    ) -> None:
        self._file = file
        self._start = (number - 1) * PART_SIZE
        self._length = min(PART_SIZE, entry.size - self._start)
        self._digests = entry.chunks[self._start // CHUNK_SIZE :]
        self._sha256 = entry.sha256 if self._length == entry.size else sha256
        self._block = memoryview(bytearray(BLOCK_SIZE))
        self._position = 0
        self._chunk = blake3()

    def __enter__(self) -> Self:
        try:
            self._source = self._file.open("rb", buffering=0)
        except OSError as error:
            raise self._unreadable(error) from error
        return self

    def __exit__(self, *_: object) -> None:
        self._source.close()

    def __len__(self) -> int:
        return self._length

    @property
    def sha256(self) -> str:
        if self._sha256 is None:
            self._sha256 = self._digest(hashlib.sha256())
        return self._sha256

    def md5(self) -> str:
        """In hexadecimal: the ETag that most servers give a part."""
        return self._digest(hashlib.md5(usedforsecurity=False))

    def tell(self) -> int:
        return self._position

    def seek(self, position: int) -> None:
        """Back to the beginning, for another attempt."""
        if position:
            raise ValueError(f"a part is read from its beginning, not from byte {position} on")
        self._position = 0
        self._chunk = blake3()

    def read(self, _size: int = -1) -> memoryview:
        """The next block, whatever size is asked for; it is good until the next call. Empty at the end."""
        left = self._length - self._position
        try:
            position = self._start + self._position
            block = read_block(self._source.fileno(), position, self._block[:left])
        except OSError as error:
            raise self._unreadable(error) from error
        if len(block) < min(left, BLOCK_SIZE):
            raise self._changed()
        self._chunk.update(block)
        self._position += len(block)
        if block and (self._position % CHUNK_SIZE == 0 or self._position == self._length):
            if self._chunk.hexdigest() != self._digests[(self._position - 1) // CHUNK_SIZE]:
                raise self._changed()
            self._chunk = blake3()
        return block

    def _digest(self, hasher: _Hash) -> str:
        self.seek(0)
        while block := self.read():
            hasher.update(block)
        self.seek(0)
        return hasher.hexdigest()

    def _unreadable(self, error: OSError) -> UnreadablePartError:
        return UnreadablePartError(f"cannot read {self._file}: {error.strerror}")

    def _changed(self) -> UnreadablePartError:
        return UnreadablePartError(
            f"{self._file} changed while it was being published. Run it again when the folder is quiet"
        )
