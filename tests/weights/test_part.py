"""A part is read as it is sent: block by block, again from its beginning, and never to its end if it is another."""

from __future__ import annotations

import hashlib
import random

import pytest

from weights.chunks import CHUNK_SIZE
from weights.digests import PART_SIZE, describe_file
from weights.errors import FolderError
from weights.part import BLOCK_SIZE, FilePart

SIZE = PART_SIZE + CHUNK_SIZE + 3 * BLOCK_SIZE // 2


@pytest.fixture(scope="module")
def content():
    return random.Random(0).randbytes(SIZE)


@pytest.fixture
def described(tmp_path, content):
    file = tmp_path / "file"
    file.write_bytes(content)
    return file, describe_file(file, "unet/file")


def sent(part):
    """What a server gets of it, block by block as it leaves, and the error that ends it."""
    blocks = []
    try:
        while block := part.read(16):
            blocks.append(bytes(block))
    except FolderError as error:
        return blocks, str(error)
    return blocks, None


def test_every_part_is_the_files_own_bytes_and_knows_their_digests(described, content):
    file, entry = described
    for number in (1, 2):
        data = content[(number - 1) * PART_SIZE : number * PART_SIZE]
        with FilePart(file, entry, number) as part:
            blocks, error = sent(part)
            part.seek(0)

            assert error is None
            assert b"".join(blocks) == data
            assert len(part) == len(data)
            assert part.sha256 == hashlib.sha256(data).hexdigest()
            assert part.md5() == hashlib.md5(data, usedforsecurity=False).hexdigest()
            assert part.tell() == 0
            assert b"".join(sent(part)[0]) == data  # a second attempt


def test_no_more_than_a_block_leaves_at_once(described):
    """A socket's time limit counts for all that it is given at once: 32 MiB take longer than that on many lines."""
    file, entry = described
    with FilePart(file, entry) as part:
        blocks, _ = sent(part)

    assert max(len(block) for block in blocks) == BLOCK_SIZE


def test_a_known_sha256_is_believed_and_a_whole_file_has_the_entrys(tmp_path, described):
    file, entry = described
    with FilePart(file, entry, 2, "0" * 64) as part:
        assert part.sha256 == "0" * 64
    small = tmp_path / "small"
    small.write_bytes(b"small")
    entry = describe_file(small, "small").model_copy(update={"sha256": "1" * 64})
    with FilePart(small, entry) as part:
        assert part.sha256 == "1" * 64


@pytest.mark.parametrize("place", [0, CHUNK_SIZE - 1, CHUNK_SIZE, SIZE - 1])
def test_of_a_file_that_has_changed_no_part_is_sent_to_its_end(described, content, place):
    file, entry = described
    changed = bytearray(content)
    changed[place] ^= 1
    file.write_bytes(changed)
    number = 1 + place // PART_SIZE

    with FilePart(file, entry, number) as part:
        blocks, error = sent(part)

    chunk_end = min((place // CHUNK_SIZE + 1) * CHUNK_SIZE, SIZE) - (number - 1) * PART_SIZE
    assert error == (
        f"{file} changed while it was being published. Run it again when the folder is quiet"
    )
    assert sum(len(block) for block in blocks) < chunk_end


@pytest.mark.parametrize("size", [0, BLOCK_SIZE, CHUNK_SIZE, PART_SIZE - 1])
def test_a_file_that_was_truncated_has_changed(described, size):
    file, entry = described
    file.write_bytes(file.read_bytes()[:size])

    with FilePart(file, entry) as part:
        blocks, error = sent(part)

    assert "changed while it was being published" in error
    assert sum(len(block) for block in blocks) <= size


@pytest.mark.parametrize("digest", ["sha256", "md5"])
def test_what_has_changed_has_no_digest_either(described, content, digest):
    file, entry = described
    file.write_bytes(bytes(len(content)))

    with FilePart(file, entry, 2) as part, pytest.raises(FolderError, match="changed while"):
        assert part.sha256 if digest == "sha256" else part.md5()


def test_a_file_that_is_gone_is_named(described):
    file, entry = described
    file.unlink()

    with (
        pytest.raises(FolderError, match=f"cannot read {file}: No such file"),
        FilePart(file, entry),
    ):
        pass
