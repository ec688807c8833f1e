"""What a file of the node cache goes through: chunks are claimed, filled and read, by whoever comes first."""

from __future__ import annotations

import os
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import pytest

from tests.support.cached_files import (
    DEADLINE,
    fill,
    fill_all,
    make_file,
    names,
    other_process,
    read,
    store,
    use_file,
)
from weights.cache import CachedFile, NodeCache
from weights.chunks import CHUNK_SIZE


def test_a_chunk_is_missing_until_it_is_filled_and_then_read_back(cache_folder):
    file = make_file(1)
    cached = file.open_in(NodeCache(cache_folder, None))

    assert not cached.has(1)
    assert not read(cached, file, 1)
    assert cached.claim(1)
    assert fill(cached, 1, [file.chunk(1)])

    assert cached.has(1)
    assert read(cached, file, 1)
    assert not cached.has(0)


def test_a_chunk_is_written_from_and_read_into_thousands_of_buffers(cache_folder):
    file = make_file(1)
    cached = file.open_in(NodeCache(cache_folder, None))
    dice = random.Random(7)
    cuts = sorted(dice.choices(range(CHUNK_SIZE), k=3000))
    cuts += [cuts[0], 0, CHUNK_SIZE]  # empty buffers, as empty tensors have
    cuts.sort()

    def cut(buffer: memoryview) -> list[memoryview]:
        return [buffer[start:end] for start, end in pairwise(cuts)]

    assert cached.claim(0)
    assert fill(cached, 0, cut(file.chunk(0)))
    assert read(cached, file, 0)


def test_what_one_process_filled_another_reads(cache_folder):
    file = make_file(1)
    with other_process(use_file, cache_folder, file) as other:
        other.ask("open")
        assert other.ask("claim 0")
        assert other.ask("fill 0")

        cached = file.open_in(NodeCache(cache_folder, None))

        assert read(cached, file, 0)
        cached.claim(1)
        fill(cached, 1, [file.chunk(1)])
        assert other.ask("read 1")


def test_nothing_but_the_entries_and_the_lock_lies_in_the_folder(cache_folder):
    file = make_file(1)
    store(NodeCache(cache_folder, None), file)

    assert names(cache_folder) == {"v1/lock", f"v1/{file.content}.data", f"v1/{file.content}.state"}


def test_a_file_without_bytes_has_no_entry(cache_folder):
    assert NodeCache(cache_folder, None).open("0" * 64, 0, []) is None


def test_a_name_that_could_lead_elsewhere_and_a_wrong_number_of_digests_are_refused(cache_folder):
    cache = NodeCache(cache_folder, None)

    with pytest.raises(ValueError, match="hexadecimal"):
        cache.open("../../" + "a" * 64, 1, ["0" * 64])
    with pytest.raises(ValueError, match="chunk digests"):
        cache.open("a" * 64, CHUNK_SIZE + 1, ["0" * 64])


# Claims


def test_a_claim_excludes_other_processes_until_it_is_released_or_filled(cache_folder):
    file = make_file(1)
    with other_process(use_file, cache_folder, file) as other:
        cached = file.open_in(NodeCache(cache_folder, None))
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


def test_a_claim_falls_when_its_process_is_killed(cache_folder):
    file = make_file(1)
    cached = file.open_in(NodeCache(cache_folder, None))
    with other_process(use_file, cache_folder, file) as other:
        other.ask("open")
        assert other.ask("claim 0")
        assert not cached.claim(0)

        other.kill()

        assert cached.claim(0)


def test_one_thread_of_many_gets_the_claim(cache_folder):
    file = make_file(1)
    caches = [NodeCache(cache_folder, None) for _ in range(2)]
    files = [file.open_in(caches[turn % 2]) for turn in range(8)]
    together = threading.Barrier(len(files))

    def claim(cached: CachedFile) -> bool:
        together.wait(DEADLINE)
        return cached.claim(0)

    with ThreadPoolExecutor(len(files)) as pool:
        assert sum(pool.map(claim, files)) == 1


def test_closing_the_file_elsewhere_in_this_process_leaves_the_claim_with_its_owner(cache_folder):
    # Closing any descriptor of a file drops all record locks that the process has on it.
    file = make_file(1)
    cached = file.open_in(NodeCache(cache_folder, None))
    again = file.open_in(NodeCache(cache_folder, None))
    assert cached.claim(0)
    assert again.claim(1)

    again.close()

    with other_process(use_file, cache_folder, file) as other:
        other.ask("open")
        assert not other.ask("claim 0")
        assert other.ask("claim 1")


def test_only_the_owner_of_a_claim_fills(cache_folder):
    file = make_file(1)
    cache = NodeCache(cache_folder, None)
    cached, again = file.open_in(cache), file.open_in(cache)
    assert cached.claim(0)

    again.release(0)

    assert not fill(again, 0, [file.chunk(0)])
    assert not again.has(0)
    assert fill(cached, 0, [file.chunk(0)])


def test_after_close_every_answer_is_no(cache_folder):
    file = make_file(1)
    cached = file.open_in(NodeCache(cache_folder, None))
    fill_all(cached, file)

    cached.close()
    cached.close()

    assert not cached.has(0)
    assert not read(cached, file, 0)
    assert not cached.claim(0)
    assert not fill(cached, 0, [file.chunk(0)])


def test_descriptors_outlive_close_for_the_threads_still_reading_and_no_longer(cache_folder):
    file = make_file(1)
    before = len(list(Path("/dev/fd").iterdir()))
    cached = file.open_in(NodeCache(cache_folder, None))
    with cached._borrowed() as entry:
        cached.close()
        os.fstat(entry.data)  # raises when it is closed

    assert len(list(Path("/dev/fd").iterdir())) == before
