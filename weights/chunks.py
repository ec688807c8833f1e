"""Files as the reader sees them: cut into chunks, each read into memory and verified as one.

Light on purpose: a reading process starts with this and little else, while others import.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

CHUNK_SIZE: Final = 16777216  # 16 MiB in bytes; the unit of verification
CONFIG_SUFFIXES = (".json", ".txt", ".model")


def chunk_count(size: int) -> int:
    """How many chunks a file of `size` bytes has; the last one may be short."""
    return -(-size // CHUNK_SIZE)


@dataclass(frozen=True)
class SnapshotFile:
    """A file of the model: `path` inside the model, `key` in the bucket, and what its bytes must be.

    `digests` are the chunks' BLAKE3s and `content` names the bytes (their SHA-256): both None in a bare folder, whose
    files have the ETag they were listed with instead.
    """

    path: str
    key: str
    size: int
    digests: tuple[str, ...] | None
    etag: str | None
    content: str | None = None

    @property
    def is_weights(self) -> bool:
        return self.path.endswith(".safetensors")

    @property
    def is_config(self) -> bool:
        """A small file that a pipeline is built from. A README, say, is neither: published and pulled, not loaded."""
        return self.path.endswith(CONFIG_SUFFIXES)

    def chunks(self) -> Iterator[Chunk]:
        for index in range(chunk_count(self.size)):
            start = index * CHUNK_SIZE
            yield Chunk(self, index, start, min(CHUNK_SIZE, self.size - start))


@dataclass(frozen=True)
class Chunk:
    """One range of one object, verified as one."""

    file: SnapshotFile
    index: int
    start: int
    length: int

    @property
    def end(self) -> int:
        return self.start + self.length

    @property
    def digest(self) -> str | None:
        """BLAKE3 as hexadecimal; None in a bare folder."""
        return self.file.digests[self.index] if self.file.digests else None
