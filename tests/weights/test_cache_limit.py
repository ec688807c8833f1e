"""The node cache keeps under its limit, and lets go of what was not used for longest."""

from __future__ import annotations

import pytest

from tests.support.cached_files import (
    MIB,
    fill,
    fill_all,
    make_file,
    names,
    other_process,
    store,
    stored,
    use_file,
)
from weights.cache import NodeCache
from weights.cache_eviction import StoredEntry, entries_to_evict


def test_the_least_recently_opened_goes_first(cache_folder):
    a, b, c, d, e = (make_file(seed, MIB) for seed in range(5))
    cache = NodeCache(cache_folder, 3 * MIB)
    for file in (a, b, c):
        store(cache, file)
    a.open_in(cache).close()

    store(cache, d)
    assert stored(cache_folder, a, b, c, d) == [True, False, True, True]

    store(cache, e)
    assert stored(cache_folder, a, b, c, d, e) == [True, False, False, True, True]


def test_an_entry_in_use_by_another_process_is_not_evicted(cache_folder):
    a, b, c, d = (make_file(seed, MIB) for seed in range(4))
    cache = NodeCache(cache_folder, 2 * MIB)
    with other_process(use_file, cache_folder, a) as other:
        other.ask("open")
        assert other.ask("claim 0")
        assert other.ask("fill 0")
        store(cache, b)

        store(cache, c)
        assert stored(cache_folder, a, b, c) == [True, False, True]
        assert other.ask("read 0")

    store(cache, d)
    assert stored(cache_folder, a, c, d) == [False, True, True]


def test_an_entry_in_use_by_this_process_is_not_evicted(cache_folder):
    a, b = make_file(0, MIB), make_file(1, MIB)
    cache = NodeCache(cache_folder, MIB)
    cached = a.open_in(cache)
    fill_all(cached, a)

    assert b.open_in(cache) is None
    cached.close()
    assert b.open_in(cache)
    assert stored(cache_folder, a, b) == [False, True]


def test_an_entry_in_use_counts_with_all_that_may_still_be_filled(cache_folder):
    large, small = make_file(1), make_file(2, MIB)
    cache = NodeCache(cache_folder, len(large.data) + MIB - 1)
    with other_process(use_file, cache_folder, large) as other:
        other.ask("open")
        assert large.path_in(cache_folder).stat().st_blocks == 0

        assert small.open_in(cache) is None
        assert stored(cache_folder, large, small) == [True, False]

    assert small.open_in(cache)


def test_an_entry_out_of_use_counts_with_what_was_filled(cache_folder):
    large, small = make_file(1), make_file(2, MIB)
    cache = NodeCache(cache_folder, len(large.data) + MIB - 1)
    cached = large.open_in(cache)
    cached.claim(1)
    fill(cached, 1, [large.chunk(1)])
    cached.close()

    store(cache, small)

    assert stored(cache_folder, large, small) == [True, True]


def test_a_file_larger_than_the_limit_has_no_entry_evicts_nothing_and_says_so_once(
    cache_folder, caplog
):
    small, large = make_file(1, MIB), make_file(2)
    cache = NodeCache(cache_folder, 2 * MIB)
    store(cache, small)

    assert large.open_in(cache) is None
    assert large.open_in(cache) is None

    assert stored(cache_folder, small, large) == [True, False]
    assert caplog.text.count("does not fit") == 1
    assert str(cache_folder) in caplog.text


def test_two_processes_that_admit_at_once_keep_under_the_limit(cache_folder):
    one, two = make_file(1, MIB), make_file(2, MIB)
    limit = len(one.data) + len(two.data) - 1
    with (
        other_process(use_file, cache_folder, one, limit) as first,
        other_process(use_file, cache_folder, two, limit) as second,
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
            in_folder = (cache_folder / "v1").glob("*.data")
            assert sum(path.stat().st_blocks * 512 for path in in_folder) <= limit


def test_what_crashes_left_behind_is_cleared_away(cache_folder):
    cache = NodeCache(cache_folder, None)
    file = make_file(1, MIB)
    for name in ("a" * 64 + ".data", "b" * 64 + ".state"):
        (cache_folder / "v1" / name).write_bytes(b"half of an entry")
    (cache_folder / "v1" / "notes.txt").write_bytes(b"not ours")

    store(cache, file)

    entry = {f"v1/{file.content}.data", f"v1/{file.content}.state"}
    assert names(cache_folder) == entry | {"v1/lock", "v1/notes.txt"}


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
