"""Digests are the field's own, over whole files, over chunks of 16 MiB and over the parts that are sent."""

import hashlib

import pytest
from blake3 import blake3

from weights.chunks import CHUNK_SIZE
from weights.digests import PART_SIZE, PartDigests, describe_file


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


@pytest.mark.parametrize("size", [PART_SIZE + 1, 2 * PART_SIZE, 2 * PART_SIZE + 1])
def test_along_the_way_every_part_gets_the_sha256_it_will_be_signed_with(tmp_path, size):
    file, data = write_file(tmp_path, size)
    parts = PartDigests()

    entry = describe_file(file, "unet/file", parts=parts)

    assert parts.found == {
        "unet/file": tuple(
            hashlib.sha256(data[start : start + PART_SIZE]).hexdigest()
            for start in range(0, size, PART_SIZE)
        )
    }
    assert entry == describe_file(file, "unet/file")


def test_parts_are_not_hashed_for_whoever_has_the_beginning_or_is_sent_the_whole(tmp_path):
    file, _ = write_file(tmp_path, PART_SIZE + 1)
    first, *_ = describe_file(file, "unet/file").chunks
    parts = PartDigests(held={first})
    describe_file(file, "unet/file", parts=parts)
    file, _ = write_file(tmp_path, PART_SIZE)
    describe_file(file, "unet/file", parts=parts)

    assert parts.found == {}
