"""The node cache never gives wrong bytes, whoever dies and whatever the disk does."""

from __future__ import annotations

import fcntl
import logging
import os
import random
import resource
import shutil
import stat
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from tests.support.cached_files import (
    MIB,
    File,
    fill,
    fill_all,
    make_file,
    names,
    other_process,
    read,
    store,
)
from weights import cache_eviction
from weights.cache import NodeCache
from weights.chunks import CHUNK_SIZE
from weights.errors import FolderError

KILLS = 20


def test_a_damaged_chunk_is_noticed_forgotten_and_filled_again(cache_folder, caplog):
    file = make_file(1)
    cached = file.open_in(NodeCache(cache_folder, None))
    fill_all(cached, file)
    with file.path_in(cache_folder).open("r+b") as data:
        data.seek(CHUNK_SIZE + 4711)
        data.write(bytes([file.data[CHUNK_SIZE + 4711] ^ 1]))

    assert not read(cached, file, 1)

    assert f"chunk 1 of {file.path_in(cache_folder)}" in caplog.text
    assert not cached.has(1)
    assert read(cached, file, 0)
    assert cached.claim(1)
    assert fill(cached, 1, [file.chunk(1)])
    assert read(cached, file, 1)


def test_data_cut_short_under_an_open_file_is_noticed_and_filled_again(cache_folder):
    file = make_file(1)
    cached = file.open_in(NodeCache(cache_folder, None))
    fill_all(cached, file)
    os.truncate(file.path_in(cache_folder), CHUNK_SIZE + 10)

    assert not read(cached, file, 1)

    assert cached.claim(1)
    assert fill(cached, 1, [file.chunk(1)])
    assert read(cached, file, 1)


@pytest.mark.parametrize("length", [0, 10, CHUNK_SIZE, CHUNK_SIZE + 10, 3 * CHUNK_SIZE])
def test_data_of_another_length_is_mended_when_opened(cache_folder, length):
    file = make_file(1)
    cache = NodeCache(cache_folder, None)
    store(cache, file)
    os.truncate(file.path_in(cache_folder), length)

    cached = file.open_in(cache)

    whole = [length >= CHUNK_SIZE, length >= len(file.data)]
    assert [cached.has(0), cached.has(1)] == whole
    assert [read(cached, file, 0), read(cached, file, 1)] == whole
    fill_all(cached, file)
    assert read(cached, file, 0)
    assert read(cached, file, 1)
    assert file.path_in(cache_folder).stat().st_size == len(file.data)


@pytest.mark.parametrize("state", [b"", b"\x01", b"\xff\x02", b"\x01" * 5000, b"\x00garbage"])
@pytest.mark.parametrize("with_data", [True, False])
def test_a_state_that_is_garbage_gives_no_wrong_bytes_and_is_mended(cache_folder, state, with_data):
    file = make_file(1)
    cache = NodeCache(cache_folder, None)
    store(cache, file)
    file.path_in(cache_folder, "state").write_bytes(state)
    if not with_data:
        os.truncate(file.path_in(cache_folder), 0)
        os.truncate(file.path_in(cache_folder), len(file.data))

    cached = file.open_in(cache)

    for index in range(2):
        believed = state[index : index + 1] == b"\x01"
        assert read(cached, file, index) == (believed and with_data)
    fill_all(cached, file)
    assert read(cached, file, 0)
    assert read(cached, file, 1)
    assert file.path_in(cache_folder, "state").stat().st_size == 2


@pytest.mark.parametrize("kind", ["data", "state"])
@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_a_link_out_of_the_folder_is_not_followed(cache_folder, tmp_path, kind, link):
    file = make_file(1)
    cache = NodeCache(cache_folder, None)
    outside = tmp_path / "outside"
    outside.write_bytes(b"somebody else's")
    link(outside, file.path_in(cache_folder, kind))

    store(cache, file)

    assert outside.read_bytes() == b"somebody else's"
    cached = file.open_in(cache)
    assert read(cached, file, 0)
    assert not file.path_in(cache_folder, kind).is_symlink()


def test_a_layout_that_is_a_link_is_refused(cache_folder, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    cache_folder.mkdir()
    (cache_folder / "v1").symlink_to(tmp_path / "elsewhere")

    with pytest.raises(FolderError):
        NodeCache(cache_folder, None)

    assert names(tmp_path / "elsewhere") == set()


def test_a_folder_under_the_name_of_an_entry_costs_that_entry_only(cache_folder, caplog):
    file, another = make_file(1), make_file(2)
    cache = NodeCache(cache_folder, 2 * len(file.data))
    file.path_in(cache_folder).mkdir()

    assert file.open_in(cache) is None
    assert "Is a directory" in caplog.text
    store(cache, another)


def test_an_emptied_folder_is_used_again_and_those_who_had_it_open_go_on(cache_folder):
    file = make_file(1)
    cache = NodeCache(cache_folder, None)
    cached = file.open_in(cache)
    fill_all(cached, file)
    shutil.rmtree(cache_folder)

    again = file.open_in(cache)

    assert read(cached, file, 0)
    assert not again.has(0)
    assert again.claim(0)
    assert fill(again, 0, [file.chunk(0)])


# The disk


def test_the_folder_is_made_for_this_user_alone(cache_folder):
    NodeCache(cache_folder, None)

    assert stat.S_IMODE(cache_folder.stat().st_mode) == 0o700


def test_a_folder_that_cannot_be_made_is_an_error_with_advice(tmp_path):
    (tmp_path / "file").write_bytes(b"")

    with pytest.raises(FolderError, match=r"file/cache.*Name a folder"):
        NodeCache(tmp_path / "file" / "cache", None)


def fill_on_a_disk_that_gets_full(connection: Connection, cache_folder: Path, file: File) -> None:
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append
    logging.getLogger("weights.cache").addHandler(handler)
    cached = file.open_in(NodeCache(cache_folder, None))
    # Python ignores SIGXFSZ, so that writing past the limit is an error like a full disk's.
    resource.setrlimit(resource.RLIMIT_FSIZE, (CHUNK_SIZE + MIB // 2, resource.RLIM_INFINITY))
    answers = [(cached.claim(index), fill(cached, index, [file.chunk(index)])) for index in (1, 0)]
    connection.send((answers, [record.getMessage() for record in records]))
    connection.recv()


def test_a_full_disk_ends_the_filling_and_the_claims_and_raises_nothing(cache_folder):
    file = make_file(1)
    with other_process(fill_on_a_disk_that_gets_full, cache_folder, file) as other:
        answers, said = other.hear()

        assert answers == [(True, False), (True, False)]
        assert len(said) == 1
        assert str(cache_folder) in said[0]
        cached = file.open_in(NodeCache(cache_folder, None))
        assert not cached.has(1)
        fill_all(cached, file)
        assert read(cached, file, 1)


def hold_the_lock(connection: Connection, cache_folder: Path) -> None:
    with (cache_folder / "v1" / "lock").open("r+b") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        connection.send("held")
        connection.recv()


def test_a_process_that_is_stuck_with_the_lock_costs_the_cache_and_not_the_loading(
    cache_folder, monkeypatch, caplog
):
    monkeypatch.setattr(cache_eviction, "LOCK_SECONDS", 0.05)
    cache = NodeCache(cache_folder, None)
    with other_process(hold_the_lock, cache_folder) as other:
        other.hear()

        assert make_file(1).open_in(cache) is None

    assert "v1/lock" in caplog.text
    assert make_file(1).open_in(cache)


def fill_over_and_over(connection: Connection, cache_folder: Path, files: list[File]) -> None:
    """There is room for all files but one, so that admissions evict."""
    cache = NodeCache(cache_folder, sum(len(file.data) for file in files[1:]))
    while True:
        for file in files:
            connection.send("next")
            store(cache, file)


def test_a_process_killed_at_any_moment_leaves_only_chunks_that_verify(cache_folder):
    files = [make_file(1), make_file(2), make_file(3)]
    dice = random.Random(20)
    found = set()
    for _ in range(KILLS):
        with other_process(fill_over_and_over, cache_folder, files) as other:
            for _ in range(dice.randint(1, 5)):
                other.hear()
            other.process.join(dice.uniform(0, 0.02))
            other.kill()

        for file in files:
            cached = file.open_in(NodeCache(cache_folder, None))
            landed = [index for index in range(2) if cached.has(index)]
            assert all(read(cached, file, index) for index in landed)
            assert all(cached.claim(index) for index in range(2) if index not in landed)
            found.add(len(landed))
            cached.close()
        expected = {f"v1/{file.content}.{kind}" for file in files for kind in ("data", "state")}
        assert names(cache_folder) == expected | {"v1/lock"}

    assert found >= {0, 2}
