"""Digests are the field's own, over whole files and over chunks of 16 MiB."""

import hashlib

import pytest
from blake3 import blake3

from weights.chunks import CHUNK_SIZE
from weights.digests import describe_file


@pytest.mark.parametrize("size", [0, 1, CHUNK_SIZE - 1, CHUNK_SIZE, CHUNK_SIZE + 1])
def test_a_file_is_described_by_sha256_and_one_blake3_a_chunk(tmp_path, size):
    data = (b"lightning in a bucket " * (size // 22 + 1))[:size]
    file = tmp_path / "file"
    file.write_bytes(data)
    hashed = []

    entry = describe_file(file, "unet/file", hashed.append)

    assert entry.size == sum(hashed) == size
    assert entry.sha256 == hashlib.sha256(data).hexdigest()
    assert list(entry.chunks) == [
        blake3(data[start : start + CHUNK_SIZE]).hexdigest() for start in range(0, size, CHUNK_SIZE)
    ]
