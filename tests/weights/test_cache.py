"""The node cache never gives wrong bytes, whoever dies and whatever the disk does, and keeps under its limit."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import multiprocessing
import os
import random
import resource
import shutil
import stat
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from weights import cache_eviction
from weights.cache import CachedFile, NodeCache
from weights.cache_eviction import StoredEntry, entries_to_evict
from weights.chunks import CHUNK_SIZE
from weights.digests import chunk_digest
from weights.errors import FolderError

MIB = 1 << 20
KILLS = 20
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


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache"


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


# What a chunk goes through


def test_a_chunk_is_missing_until_it_is_filled_and_then_read_back(folder):
    file = make_file(1)
    cached = file.open_in(NodeCache(folder, None))

    assert not cached.has(1)
    assert not read(cached, file, 1)
    assert cached.claim(1)
    assert fill(cached, 1, [file.chunk(1)])

    assert cached.has(1)
    assert read(cached, file, 1)
    assert not cached.has(0)


def test_a_chunk_is_written_from_and_read_into_thousands_of_buffers(folder):
    file = make_file(1)
    cached = file.open_in(NodeCache(folder, None))
    dice = random.Random(7)
    cuts = sorted(dice.choices(range(CHUNK_SIZE), k=3000))
    cuts += [cuts[0], 0, CHUNK_SIZE]  # empty buffers, as empty tensors have
    cuts.sort()

    def cut(buffer: memoryview) -> list[memoryview]:
        return [buffer[start:end] for start, end in pairwise(cuts)]

    assert cached.claim(0)
    assert fill(cached, 0, cut(file.chunk(0)))
    assert read(cached, file, 0)


def test_what_one_process_filled_another_reads(folder):
    file = make_file(1)
    with other_process(use_file, folder, file) as other:
        other.ask("open")
        assert other.ask("claim 0")
        assert other.ask("fill 0")

        cached = file.open_in(NodeCache(folder, None))

        assert read(cached, file, 0)
        cached.claim(1)
        fill(cached, 1, [file.chunk(1)])
        assert other.ask("read 1")


def test_nothing_but_the_entries_and_the_lock_lies_in_the_folder(folder):
    file = make_file(1)
    store(NodeCache(folder, None), file)

    assert names(folder) == {"v1/lock", f"v1/{file.content}.data", f"v1/{file.content}.state"}


def test_a_file_without_bytes_has_no_entry(folder):
    assert NodeCache(folder, None).open("0" * 64, 0, []) is None


def test_a_name_that_could_lead_elsewhere_and_a_wrong_number_of_digests_are_refused(folder):
    cache = NodeCache(folder, None)

    with pytest.raises(ValueError, match="hexadecimal"):
        cache.open("../../" + "a" * 64, 1, ["0" * 64])
    with pytest.raises(ValueError, match="chunk digests"):
        cache.open("a" * 64, CHUNK_SIZE + 1, ["0" * 64])


# Claims


def test_a_claim_excludes_other_processes_until_it_is_released_or_filled(folder):
    file = make_file(1)
    with other_process(use_file, folder, file) as other:
        cached = file.open_in(NodeCache(folder, None))
        other.ask("open")

        assert cached.claim(0)
        assert not other.ask("claim 0")
        assert other.ask("claim 1")
        assert not cached.claim(1)

        cached.release(0)
        assert other.ask("claim 0")
        assert other.ask("fill 0")
        assert not cached.claim(0)  # landed
        assert cached.has(0)


def test_a_claim_falls_when_its_process_is_killed(folder):
    file = make_file(1)
    cached = file.open_in(NodeCache(folder, None))
    with other_process(use_file, folder, file) as other:
        other.ask("open")
        assert other.ask("claim 0")
        assert not cached.claim(0)

        other.kill()

        assert cached.claim(0)


def test_one_thread_of_many_gets_the_claim(folder):
    file = make_file(1)
    caches = [NodeCache(folder, None) for _ in range(2)]
    files = [file.open_in(caches[turn % 2]) for turn in range(8)]
    together = threading.Barrier(len(files))

    def claim(cached: CachedFile) -> bool:
        together.wait(DEADLINE)
        return cached.claim(0)

    with ThreadPoolExecutor(len(files)) as pool:
        assert sum(pool.map(claim, files)) == 1


def test_closing_the_file_elsewhere_in_this_process_leaves_the_claim_with_its_owner(folder):
    # Closing any descriptor of a file drops all record locks that the process has on it.
    file = make_file(1)
    cached = file.open_in(NodeCache(folder, None))
    again = file.open_in(NodeCache(folder, None))
    assert cached.claim(0)
    assert again.claim(1)

    again.close()

    with other_process(use_file, folder, file) as other:
        other.ask("open")
        assert not other.ask("claim 0")
        assert other.ask("claim 1")


def test_only_the_owner_of_a_claim_fills(folder):
    file = make_file(1)
    cache = NodeCache(folder, None)
    cached, again = file.open_in(cache), file.open_in(cache)
    assert cached.claim(0)

    again.release(0)

    assert not fill(again, 0, [file.chunk(0)])
    assert not again.has(0)
    assert fill(cached, 0, [file.chunk(0)])


def test_after_close_every_answer_is_no(folder):
    file = make_file(1)
    cached = file.open_in(NodeCache(folder, None))
    fill_all(cached, file)

    cached.close()
    cached.close()

    assert not cached.has(0)
    assert not read(cached, file, 0)
    assert not cached.claim(0)
    assert not fill(cached, 0, [file.chunk(0)])


def test_descriptors_outlive_close_for_the_threads_still_reading_and_no_longer(folder):
    file = make_file(1)
    before = len(list(Path("/dev/fd").iterdir()))
    cached = file.open_in(NodeCache(folder, None))
    with cached._borrowed() as entry:
        cached.close()
        os.fstat(entry.data)  # raises when it is closed

    assert len(list(Path("/dev/fd").iterdir())) == before


# Damage


def test_a_damaged_chunk_is_noticed_forgotten_and_filled_again(folder, caplog):
    file = make_file(1)
    cached = file.open_in(NodeCache(folder, None))
    fill_all(cached, file)
    with file.path_in(folder).open("r+b") as data:
        data.seek(CHUNK_SIZE + 4711)
        data.write(bytes([file.data[CHUNK_SIZE + 4711] ^ 1]))

    assert not read(cached, file, 1)

    assert f"chunk 1 of {file.path_in(folder)}" in caplog.text
    assert not cached.has(1)
    assert read(cached, file, 0)
    assert cached.claim(1)
    assert fill(cached, 1, [file.chunk(1)])
    assert read(cached, file, 1)


def test_data_cut_short_under_an_open_file_is_noticed_and_filled_again(folder):
    file = make_file(1)
    cached = file.open_in(NodeCache(folder, None))
    fill_all(cached, file)
    os.truncate(file.path_in(folder), CHUNK_SIZE + 10)

    assert not read(cached, file, 1)

    assert cached.claim(1)
    assert fill(cached, 1, [file.chunk(1)])
    assert read(cached, file, 1)


@pytest.mark.parametrize("length", [0, 10, CHUNK_SIZE, CHUNK_SIZE + 10, 3 * CHUNK_SIZE])
def test_data_of_another_length_is_mended_when_opened(folder, length):
    file = make_file(1)
    cache = NodeCache(folder, None)
    store(cache, file)
    os.truncate(file.path_in(folder), length)

    cached = file.open_in(cache)

    whole = [length >= CHUNK_SIZE, length >= len(file.data)]
    assert [cached.has(0), cached.has(1)] == whole
    assert [read(cached, file, 0), read(cached, file, 1)] == whole
    fill_all(cached, file)
    assert read(cached, file, 0)
    assert read(cached, file, 1)
    assert file.path_in(folder).stat().st_size == len(file.data)


@pytest.mark.parametrize("state", [b"", b"\x01", b"\xff\x02", b"\x01" * 5000, b"\x00garbage"])
@pytest.mark.parametrize("with_data", [True, False])
def test_a_state_that_is_garbage_gives_no_wrong_bytes_and_is_mended(folder, state, with_data):
    file = make_file(1)
    cache = NodeCache(folder, None)
    store(cache, file)
    file.path_in(folder, "state").write_bytes(state)
    if not with_data:
        os.truncate(file.path_in(folder), 0)
        os.truncate(file.path_in(folder), len(file.data))

    cached = file.open_in(cache)

    for index in range(2):
        believed = state[index : index + 1] == b"\x01"
        assert read(cached, file, index) == (believed and with_data)
    fill_all(cached, file)
    assert read(cached, file, 0)
    assert read(cached, file, 1)
    assert file.path_in(folder, "state").stat().st_size == 2


@pytest.mark.parametrize("kind", ["data", "state"])
@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_a_link_out_of_the_folder_is_not_followed(folder, tmp_path, kind, link):
    file = make_file(1)
    cache = NodeCache(folder, None)
    outside = tmp_path / "outside"
    outside.write_bytes(b"somebody else's")
    link(outside, file.path_in(folder, kind))

    store(cache, file)

    assert outside.read_bytes() == b"somebody else's"
    cached = file.open_in(cache)
    assert read(cached, file, 0)
    assert not file.path_in(folder, kind).is_symlink()


def test_a_layout_that_is_a_link_is_refused(folder, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    folder.mkdir()
    (folder / "v1").symlink_to(tmp_path / "elsewhere")

    with pytest.raises(FolderError):
        NodeCache(folder, None)

    assert names(tmp_path / "elsewhere") == set()


def test_a_folder_under_the_name_of_an_entry_costs_that_entry_only(folder, caplog):
    file, another = make_file(1), make_file(2)
    cache = NodeCache(folder, 2 * len(file.data))
    file.path_in(folder).mkdir()

    assert file.open_in(cache) is None
    assert "Is a directory" in caplog.text
    store(cache, another)


def test_an_emptied_folder_is_used_again_and_those_who_had_it_open_go_on(folder):
    file = make_file(1)
    cache = NodeCache(folder, None)
    cached = file.open_in(cache)
    fill_all(cached, file)
    shutil.rmtree(folder)

    again = file.open_in(cache)

    assert read(cached, file, 0)
    assert not again.has(0)
    assert again.claim(0)
    assert fill(again, 0, [file.chunk(0)])


# The disk


def test_the_folder_is_made_for_this_user_alone(folder):
    NodeCache(folder, None)

    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_a_folder_that_cannot_be_made_is_an_error_with_advice(tmp_path):
    (tmp_path / "file").write_bytes(b"")

    with pytest.raises(FolderError, match=r"file/cache.*Name a folder"):
        NodeCache(tmp_path / "file" / "cache", None)


def fill_on_a_disk_that_gets_full(connection: Connection, folder: Path, file: File) -> None:
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append
    logging.getLogger("weights.cache").addHandler(handler)
    cached = file.open_in(NodeCache(folder, None))
    # Python ignores SIGXFSZ, so that writing past the limit is an error like a full disk's.
    resource.setrlimit(resource.RLIMIT_FSIZE, (CHUNK_SIZE + MIB // 2, resource.RLIM_INFINITY))
    answers = [(cached.claim(index), fill(cached, index, [file.chunk(index)])) for index in (1, 0)]
    connection.send((answers, [record.getMessage() for record in records]))
    connection.recv()


def test_a_full_disk_ends_the_filling_and_the_claims_and_raises_nothing(folder):
    file = make_file(1)
    with other_process(fill_on_a_disk_that_gets_full, folder, file) as other:
        answers, said = other.hear()

        assert answers == [(True, False), (True, False)]
        assert len(said) == 1
        assert str(folder) in said[0]
        cached = file.open_in(NodeCache(folder, None))
        assert not cached.has(1)
        fill_all(cached, file)
        assert read(cached, file, 1)


def hold_the_lock(connection: Connection, folder: Path) -> None:
    with (folder / "v1" / "lock").open("r+b") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        connection.send("held")
        connection.recv()


def test_a_process_that_is_stuck_with_the_lock_costs_the_cache_and_not_the_loading(
    folder, monkeypatch, caplog
):
    monkeypatch.setattr(cache_eviction, "LOCK_SECONDS", 0.05)
    cache = NodeCache(folder, None)
    with other_process(hold_the_lock, folder) as other:
        other.hear()

        assert make_file(1).open_in(cache) is None

    assert "v1/lock" in caplog.text
    assert make_file(1).open_in(cache)


def fill_over_and_over(connection: Connection, folder: Path, files: list[File]) -> None:
    """There is room for all files but one, so that admissions evict."""
    cache = NodeCache(folder, sum(len(file.data) for file in files[1:]))
    while True:
        for file in files:
            connection.send("next")
            store(cache, file)


def test_a_process_killed_at_any_moment_leaves_only_chunks_that_verify(folder):
    files = [make_file(1), make_file(2), make_file(3)]
    dice = random.Random(20)
    found = set()
    for _ in range(KILLS):
        with other_process(fill_over_and_over, folder, files) as other:
            for _ in range(dice.randint(1, 5)):
                other.hear()
            other.process.join(dice.uniform(0, 0.02))
            other.kill()

        for file in files:
            cached = file.open_in(NodeCache(folder, None))
            landed = [index for index in range(2) if cached.has(index)]
            assert all(read(cached, file, index) for index in landed)
            assert all(cached.claim(index) for index in range(2) if index not in landed)
            found.add(len(landed))
            cached.close()
        expected = {f"v1/{file.content}.{kind}" for file in files for kind in ("data", "state")}
        assert names(folder) == expected | {"v1/lock"}

    assert found >= {0, 2}


# The limit


def test_the_least_recently_opened_goes_first(folder):
    a, b, c, d, e = (make_file(seed, MIB) for seed in range(5))
    cache = NodeCache(folder, 3 * MIB)
    for file in (a, b, c):
        store(cache, file)
    a.open_in(cache).close()

    store(cache, d)
    assert stored(folder, a, b, c, d) == [True, False, True, True]

    store(cache, e)
    assert stored(folder, a, b, c, d, e) == [True, False, False, True, True]


def test_an_entry_in_use_by_another_process_is_not_evicted(folder):
    a, b, c, d = (make_file(seed, MIB) for seed in range(4))
    cache = NodeCache(folder, 2 * MIB)
    with other_process(use_file, folder, a) as other:
        other.ask("open")
        assert other.ask("claim 0")
        assert other.ask("fill 0")
        store(cache, b)

        store(cache, c)
        assert stored(folder, a, b, c) == [True, False, True]
        assert other.ask("read 0")

    store(cache, d)
    assert stored(folder, a, c, d) == [False, True, True]


def test_an_entry_in_use_by_this_process_is_not_evicted(folder):
    a, b = make_file(0, MIB), make_file(1, MIB)
    cache = NodeCache(folder, MIB)
    cached = a.open_in(cache)
    fill_all(cached, a)

    assert b.open_in(cache) is None
    cached.close()
    assert b.open_in(cache)
    assert stored(folder, a, b) == [False, True]


def test_an_entry_in_use_counts_with_all_that_may_still_be_filled(folder):
    large, small = make_file(1), make_file(2, MIB)
    cache = NodeCache(folder, len(large.data) + MIB - 1)
    with other_process(use_file, folder, large) as other:
        other.ask("open")
        assert large.path_in(folder).stat().st_blocks == 0

        assert small.open_in(cache) is None
        assert stored(folder, large, small) == [True, False]

    assert small.open_in(cache)


def test_an_entry_out_of_use_counts_with_what_was_filled(folder):
    large, small = make_file(1), make_file(2, MIB)
    cache = NodeCache(folder, len(large.data) + MIB - 1)
    cached = large.open_in(cache)
    cached.claim(1)
    fill(cached, 1, [large.chunk(1)])
    cached.close()

    store(cache, small)

    assert stored(folder, large, small) == [True, True]


def test_a_file_larger_than_the_limit_has_no_entry_evicts_nothing_and_says_so_once(folder, caplog):
    small, large = make_file(1, MIB), make_file(2)
    cache = NodeCache(folder, 2 * MIB)
    store(cache, small)

    assert large.open_in(cache) is None
    assert large.open_in(cache) is None

    assert stored(folder, small, large) == [True, False]
    assert caplog.text.count("does not fit") == 1
    assert str(folder) in caplog.text


def test_two_processes_that_admit_at_once_keep_under_the_limit(folder):
    one, two = make_file(1, MIB), make_file(2, MIB)
    limit = len(one.data) + len(two.data) - 1
    with (
        other_process(use_file, folder, one, limit) as first,
        other_process(use_file, folder, two, limit) as second,
    ):
        for _ in range(10):
            first._here.send("open")
            second._here.send("open")

            admitted = [first.hear(), second.hear()]

            assert sorted(admitted) == [False, True]
            winner = first if admitted[0] else second
            winner.ask("claim 0")
            assert winner.ask("fill 0") or winner.ask("read 0")
            winner.ask("close")
            in_folder = (folder / "v1").glob("*.data")
            assert sum(path.stat().st_blocks * 512 for path in in_folder) <= limit


def test_what_crashes_left_behind_is_cleared_away(folder):
    cache = NodeCache(folder, None)
    file = make_file(1, MIB)
    for name in ("a" * 64 + ".data", "b" * 64 + ".state"):
        (folder / "v1" / name).write_bytes(b"half of an entry")
    (folder / "v1" / "notes.txt").write_bytes(b"not ours")

    store(cache, file)

    entry = {f"v1/{file.content}.data", f"v1/{file.content}.state"}
    assert names(folder) == entry | {"v1/lock", "v1/notes.txt"}


@pytest.mark.parametrize(
    ("size", "limit", "evicted"),
    [
        (10, 100, []),
        (40, 100, []),
        (41, 100, ["old"]),
        (60, 100, ["old"]),
        (61, 100, ["old", "new"]),
        (70, 100, ["old", "new"]),
        (71, 100, None),
    ],
)
def test_no_more_is_evicted_than_must_be(size, limit, evicted):
    entries = [
        StoredEntry("new", size=90, allocated=10, last_used=3, in_use=False),
        StoredEntry("busy", size=30, allocated=5, last_used=1, in_use=True),
        StoredEntry("old", size=20, allocated=20, last_used=2, in_use=False),
    ]

    assert entries_to_evict(entries, size, limit) == evicted
