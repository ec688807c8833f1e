"""The digests of files and chunks: SHA-256 for people and the Hub, BLAKE3 for the loader.

BLAKE3 runs at 7 GB/s a core where SHA-256 runs at 1.9, and at 0.4 without SHA instructions, which is why chunks, which
are verified at every cold start, carry BLAKE3.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from blake3 import blake3

from weights.chunks import CHUNK_SIZE
from weights.manifest import FileEntry

# Bytes of a file that one request sends; at S3's limit of 10,000 parts that allows files of 335 GB.
PART_SIZE: Final = 2 * CHUNK_SIZE
# Bytes that are read at once, and hashed while they are in the core's own cache. Out of main memory, beside other
# threads that use it, SHA-256 takes 0.83 s/GB instead of 0.52.
BLOCK_SIZE: Final = 256 * 1024

Progress = Callable[[int], None]


def chunk_digest(parts: Iterable[memoryview | bytes]) -> str:
    """BLAKE3 of the concatenated parts, as hexadecimal."""
    hasher = blake3()
    for part in parts:
        hasher.update(part)
    return hasher.hexdigest()


@dataclass(frozen=True)
class PartDigests:
    """The SHA-256s that the requests for a file's parts will be signed with, by its path, for files of several parts.

    They are `found` in bytes that are read and hashed anyway, unless the receiver has the file's first chunk, by the
    digests it is known to have (`held`): then it most likely has all of it.
    """

    held: Collection[str] = ()
    found: dict[str, tuple[str, ...]] = field(default_factory=dict)


def describe_file(
    file: Path, path: str, on_bytes: Progress | None = None, parts: PartDigests | None = None
) -> FileEntry:
    """Read `file` once and return its entry under `path`. Raises OSError, and ValueError for a forbidden path."""
    sha256 = part = hashlib.sha256()  # of the first part it is the same
    chunk = blake3()
    chunks, signed = [], []
    size = 0
    block = memoryview(bytearray(BLOCK_SIZE))
    with file.open("rb", buffering=0) as source:
        while read := read_block(source.fileno(), size, block):
            if size and size % CHUNK_SIZE == 0:
                chunks.append(chunk.hexdigest())
                chunk = blake3()
            if size and size % PART_SIZE == 0 and parts and chunks[0] not in parts.held:
                signed.append(part.hexdigest())
                part = hashlib.sha256()
            sha256.update(read)
            chunk.update(read)
            if part is not sha256:
                part.update(read)
            size += len(read)
            if on_bytes:
                on_bytes(len(read))
    if size:
        chunks.append(chunk.hexdigest())
    if parts and signed:
        parts.found[path] = (*signed, part.hexdigest())
    return FileEntry(path=path, size=size, sha256=sha256.hexdigest(), chunks=tuple(chunks))


def read_block(descriptor: int, position: int, block: memoryview) -> memoryview:
    """Read from `position` on until `block` is full or the file ends, and return what was filled of it.

    Network file systems give less at a time. Raises OSError.
    """
    filled = 0
    while filled < len(block):
        count = os.preadv(descriptor, [block[filled:]], position + filled)
        if count == 0:
            break
        filled += count
    return block[:filled]
