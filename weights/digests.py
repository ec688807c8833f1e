"""The digests of files and chunks: SHA-256 for people and the Hub, BLAKE3 for the loader.

BLAKE3 runs at 7 GB/s a core where SHA-256 runs at 1.9, and at 0.4 without SHA instructions, which is why chunks, which
are verified at every cold start, carry BLAKE3.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import zip_longest
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
OnParts = Callable[[str, tuple[str, ...]], None]  # a file's path, and the SHA-256s of its parts


def chunk_digest(parts: Iterable[memoryview | bytes]) -> str:
    """BLAKE3 of the concatenated parts, as hexadecimal."""
    hasher = blake3()
    for part in parts:
        hasher.update(part)
    return hasher.hexdigest()


def describe_file(
    file: Path, path: str, on_bytes: Progress | None = None, on_parts: OnParts | None = None
) -> FileEntry:
    """Read `file` once and return its entry under `path`; `on_parts` is told the SHA-256 of each part to be sent.

    Raises OSError, and ValueError for a forbidden path.
    """
    sha256 = part = hashlib.sha256()  # of the first part it is the same
    chunks: list[str] = []
    parts: list[str] = []
    size = 0

    def take(block: memoryview) -> None:
        nonlocal part, size
        if on_parts and size and size % PART_SIZE == 0:
            parts.append(part.hexdigest())
            part = hashlib.sha256()
        sha256.update(block)
        if part is not sha256:
            part.update(block)
        size += len(block)
        if on_bytes:
            on_bytes(len(block))

    with file.open("rb", buffering=0) as source:
        chunks += _chunk_digests(source.fileno(), take)
    if on_parts:
        on_parts(path, (*parts, part.hexdigest()))
    return FileEntry(path=path, size=size, sha256=sha256.hexdigest(), chunks=tuple(chunks))


def consists_of(file: Path, chunks: Sequence[str], on_bytes: Progress | None = None) -> bool:
    """Whether these are the BLAKE3s of the file's chunks: a third of the work of describing it, or less, since it is
    read to the first difference. `on_bytes` takes all back then. Raises OSError."""
    size = 0

    def take(block: memoryview) -> None:
        nonlocal size
        size += len(block)
        if on_bytes:
            on_bytes(len(block))

    with file.open("rb", buffering=0) as source:
        found = _chunk_digests(source.fileno(), take)
        is_same = all(one == other for one, other in zip_longest(found, chunks))
    if on_bytes and not is_same:
        on_bytes(-size)
    return is_same


def _chunk_digests(descriptor: int, take: Callable[[memoryview], None]) -> Iterator[str]:
    """The BLAKE3 of one chunk after the other; `take` gets every block of them, to keep until it returns."""
    block = memoryview(bytearray(BLOCK_SIZE))
    position = 0
    while True:
        hasher = blake3()
        start = position
        while position < start + CHUNK_SIZE and (read := read_block(descriptor, position, block)):
            hasher.update(read)
            take(read)
            position += len(read)
        if position == start:
            return
        yield hasher.hexdigest()


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
