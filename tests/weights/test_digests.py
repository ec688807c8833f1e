"""Digests are the field's own, over whole files, over chunks of 16 MiB and over the parts that are sent."""

import hashlib

import pytest
from blake3 import blake3

from weights.chunks import CHUNK_SIZE
from weights.digests import PART_SIZE, consists_of, describe_file


def write_file(folder, size):
    data = (b"lightning in a bucket " * (size // 22 + 1))[:size]
    (folder / "file").write_bytes(data)
    return folder / "file", data


@pytest.mark.parametrize("size", [0, 1, CHUNK_SIZE - 1, CHUNK_SIZE, CHUNK_SIZE + 1])
def test_a_file_is_described_by_sha256_and_one_blake3_a_chunk(tmp_path, size):
    file, data = write_file(tmp_path, size)
    hashed = []

    entry = describe_file(file, "unet/file", hashed.append)

    assert entry.size == sum(hashed) == size
    assert entry.sha256 == hashlib.sha256(data).hexdigest()
    assert list(entry.chunks) == [
        blake3(data[start : start + CHUNK_SIZE]).hexdigest() for start in range(0, size, CHUNK_SIZE)
    ]


@pytest.mark.parametrize("size", [0, 1, PART_SIZE, PART_SIZE + 1, 2 * PART_SIZE])
def test_along_the_way_every_part_gets_the_sha256_it_will_be_signed_with(tmp_path, size):
    file, data = write_file(tmp_path, size)
    told = {}

    entry = describe_file(file, "unet/file", on_parts=told.__setitem__)

    parts = [data[start : start + PART_SIZE] for start in range(0, size, PART_SIZE)] or [b""]
    assert told == {"unet/file": tuple(hashlib.sha256(part).hexdigest() for part in parts)}
    assert entry == describe_file(file, "unet/file")


@pytest.mark.parametrize("size", [0, 1, CHUNK_SIZE, CHUNK_SIZE + 1])
def test_a_file_consists_of_its_own_chunks(tmp_path, size):
    file, _ = write_file(tmp_path, size)
    chunks = describe_file(file, "file").chunks
    told = []

    assert consists_of(file, chunks, told.append)
    assert sum(told) == size


@pytest.mark.parametrize(
    ("spoil", "read"),
    [
        (lambda data: b"x" + data[1:], CHUNK_SIZE),
        (lambda data: data[:-1] + b"x", 2 * CHUNK_SIZE + 1),
        (lambda data: data[:-1], 2 * CHUNK_SIZE),
        (lambda data: data + b"x", 2 * CHUNK_SIZE + 2),
        (lambda data: data[:CHUNK_SIZE], CHUNK_SIZE),
        (lambda data: b"", 0),
    ],
)
def test_a_file_is_read_to_the_first_chunk_that_is_another(tmp_path, spoil, read):
    file, data = write_file(tmp_path, 2 * CHUNK_SIZE + 1)
    chunks = describe_file(file, "file").chunks
    file.write_bytes(spoil(data))
    told = []

    assert not consists_of(file, chunks, told.append)
    assert sum(told) == 0  # it is going to be read again
    assert sum(count for count in told if count > 0) == read
