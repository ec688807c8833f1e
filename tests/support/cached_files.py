"""Files of the node cache: made, filled and read as the loader does it, by this process and by another."""

from __future__ import annotations

import contextlib
import hashlib
import multiprocessing
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from weights.cache import CachedFile, NodeCache
from weights.chunks import CHUNK_SIZE
from weights.digests import chunk_digest

MIB = 1 << 20
DEADLINE = 60  # seconds; only ever waited out by a test that fails
# Real processes that start at once, since they need not import anything.
processes = multiprocessing.get_context("fork")


@dataclass(frozen=True)
class File:
    """A file as a manifest knows it, and its bytes."""

    data: bytes
    content: str
    digests: tuple[str, ...]

    def chunk(self, index: int) -> memoryview:
        return memoryview(self.data)[index * CHUNK_SIZE : (index + 1) * CHUNK_SIZE]

    def open_in(self, cache: NodeCache) -> CachedFile | None:
        return cache.open(self.content, len(self.data), self.digests)

    def path_in(self, folder: Path, kind: str = "data") -> Path:
        return folder / "v1" / f"{self.content}.{kind}"


@lru_cache(maxsize=32)
def make_file(seed: int, size: int = CHUNK_SIZE + MIB) -> File:
    """A file of random bytes; by default of two chunks, the second one short."""
    data = random.Random(seed).randbytes(size)
    chunks = (memoryview(data)[start : start + CHUNK_SIZE] for start in range(0, size, CHUNK_SIZE))
    digests = tuple(chunk_digest([chunk]) for chunk in chunks)
    return File(data, hashlib.sha256(data).hexdigest(), digests)


def fill_all(cached: CachedFile, file: File) -> None:
    for index in range(len(file.digests)):
        if cached.claim(index):
            assert fill(cached, index, [file.chunk(index)])


def store(cache: NodeCache, file: File) -> None:
    """Admit a file, fill it and let go of it."""
    cached = file.open_in(cache)
    assert cached
    fill_all(cached, file)
    cached.close()


def fill(cached: CachedFile, index: int, parts: list[memoryview]) -> bool:
    """Write a chunk part by part, as it comes from the network."""
    offset = 0
    for part in parts:
        cached.write_at(index, offset, part)
        offset += len(part)
    return cached.complete(index)


def read(cached: CachedFile, file: File, index: int) -> bool:
    """Whether the chunk is here and right; one that is not is forgotten, as a reader does."""
    if not cached.has(index):
        return False
    chunk = file.chunk(index)
    buffer = memoryview(bytearray(len(chunk)))
    filled = 0
    while filled < len(buffer):
        count = cached.read_at(index, filled, buffer[filled:])
        if not count:
            break
        filled += count
    if filled == len(buffer) and chunk_digest([buffer]) == file.digests[index]:
        assert buffer == chunk
        return True
    cached.forget(index)
    return False


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def stored(folder: Path, *files: File) -> list[bool]:
    return [file.path_in(folder).exists() for file in files]


class OtherProcess:
    """A process that runs `work(connection, *arguments)`, and this end of its connection."""

    def __init__(self, work: Callable[..., None], *arguments: Any) -> None:
        self._here, there = processes.Pipe()
        self.process = processes.Process(target=work, args=(there, *arguments), daemon=True)
        self.process.start()
        there.close()

    def hear(self) -> Any:
        assert self._here.poll(DEADLINE), "the other process says nothing"
        return self._here.recv()

    def ask(self, word: str) -> Any:
        self._here.send(word)
        return self.hear()

    def kill(self) -> None:
        """kill -9, and wait for it to be gone."""
        self.process.kill()
        self.process.join(DEADLINE)
        assert self.process.exitcode is not None
        self._here.close()


@contextlib.contextmanager
def other_process(work: Callable[..., None], *arguments: Any) -> Iterator[OtherProcess]:
    other = OtherProcess(work, *arguments)
    try:
        yield other
    finally:
        other.kill()


def use_file(connection: Connection, folder: Path, file: File, limit: int | None = None) -> None:
    """Do to a file of the cache what one is asked to, and answer what came of it."""
    cached = None
    cache = NodeCache(folder, limit)
    while True:
        match connection.recv().split():
            case ["open"]:
                cached = file.open_in(cache)
                connection.send(cached is not None)
            case ["claim", index]:
                connection.send(cached.claim(int(index)))
            case ["fill", index]:
                connection.send(fill(cached, int(index), [file.chunk(int(index))]))
            case ["read", index]:
                connection.send(read(cached, file, int(index)))
            case ["close"]:
                connection.send(cached.close())
