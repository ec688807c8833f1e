"""A PNG of ours is one that every reader reads, pixel by pixel, and its text is what Pillow would have written."""

from __future__ import annotations

import io
import itertools
import struct
import subprocess
import sys
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image, PngImagePlugin

from images.png import png_file

ROOT = Path(__file__).resolve().parents[2]

SIZES = [(1, 1), (1, 300), (300, 1), (333, 127), (4096, 3), (3, 4096), (1344, 768)]


def noise(width: int, height: int) -> Image.Image:
    """Every byte at random: each sum and difference a filter can meet, with its overflows."""
    generator = np.random.default_rng(width * 10_007 + height)
    return Image.fromarray(generator.integers(0, 256, (height, width, 3), np.uint8))


def extremes(width: int, height: int) -> Image.Image:
    """Only 0 and 255, in squares of odd sizes: the largest steps, and runs between them."""
    y, x = np.mgrid[0:height, 0:width]
    channels = [((x // step + y // step) % 2 * 255).astype(np.uint8) for step in (1, 3, 7)]
    return Image.fromarray(np.stack(channels, axis=-1))


def some_text() -> PngImagePlugin.PngInfo:
    text = PngImagePlugin.PngInfo()
    text.add_text("prompt", "a cat 🐈 at the café")
    text.add_text("seed", "7")
    return text


def pixels(data: bytes) -> npt.NDArray[np.uint8]:
    with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
        assert image.mode == "RGB"
        return np.asarray(image)


def chunks(data: bytes) -> Iterator[tuple[bytes, bytes, int]]:
    """PNG 5.3: length, name, data, and the CRC as it stands in the file."""
    position = 8
    while position < len(data):
        (length,) = struct.unpack_from(">I", data, position)
        name = data[position + 4 : position + 8]
        body = data[position + 8 : position + 8 + length]
        (crc,) = struct.unpack_from(">I", data, position + 8 + length)
        yield name, body, crc
        position += 12 + length


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
@pytest.mark.parametrize("paint", [noise, extremes])
def test_every_pixel_comes_back(paint, size: tuple[int, int]) -> None:
    image = paint(*size)

    assert np.array_equal(pixels(png_file(image, some_text())), np.asarray(image))


def test_every_small_size_comes_back() -> None:
    for width, height in itertools.product(range(1, 9), range(1, 9)):
        image = noise(width, height)

        assert np.array_equal(pixels(png_file(image, some_text())), np.asarray(image))


def test_an_image_that_was_cropped_or_only_opened_comes_back() -> None:
    """Neither has its pixels in memory the way a new one does."""
    stream = io.BytesIO()
    noise(70, 70).save(stream, "PNG")
    opened = Image.open(stream)
    cropped = noise(70, 70).crop((3, 5, 60, 69))

    assert np.array_equal(pixels(png_file(opened, some_text())), np.asarray(noise(70, 70)))
    assert np.array_equal(pixels(png_file(cropped, some_text())), np.asarray(cropped))


def test_the_file_is_laid_out_as_the_standard_wants_it() -> None:
    data = png_file(noise(33, 20), some_text())
    found = list(chunks(data))

    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert [name for name, _, _ in found] == [b"IHDR", b"iTXt", b"tEXt", b"IDAT", b"IEND"]
    assert all(crc == zlib.crc32(name + body) for name, body, crc in found)
    assert found[0][1] == struct.pack(">IIBBBBB", 33, 20, 8, 2, 0, 0, 0)
    rows = zlib.decompress(found[3][1])
    assert len(rows) == 20 * (1 + 3 * 33)
    assert set(rows[:: 1 + 3 * 33]) == {2}


@pytest.mark.parametrize("value", ["plain", "café", "富士山 🌙", "two\nlines", "x" * 100_000])
def test_text_is_byte_for_byte_what_pillow_writes(value: str) -> None:
    text = PngImagePlugin.PngInfo()
    text.add_text("prompt", value)
    text.add_text("seed", "7")
    image = noise(8, 8)
    stream = io.BytesIO()
    image.save(stream, "PNG", pnginfo=text)
    theirs = stream.getvalue()

    ours = png_file(image, text)

    assert ours[: ours.index(b"IDAT") - 4] == theirs[: theirs.index(b"IDAT") - 4]


def test_a_picture_takes_no_more_than_pillow_s_fastest_level_does() -> None:
    """A gradient with grain, which is what a decoder paints. Stored, it would be half as large again."""
    y, x = np.mgrid[0:512, 0:512]
    smooth = np.stack([x / 4, y / 4, (x + y) / 8], axis=-1) + 60
    grain = np.random.default_rng(7).normal(0, 2, smooth.shape)
    image = Image.fromarray((smooth + grain).round().clip(0, 255).astype(np.uint8))
    stream = io.BytesIO()
    image.save(stream, "PNG", compress_level=1)

    assert len(png_file(image, PngImagePlugin.PngInfo())) < 1.15 * len(stream.getvalue())


def test_images_encoded_at_once_do_not_meet() -> None:
    images = [noise(200 + number, 150) for number in range(4)]
    files: dict[int, set[bytes]] = {number: set() for number in range(4)}

    def encode_often(number: int) -> None:
        for _ in range(20):
            files[number].add(png_file(images[number], some_text()))

    threads = [threading.Thread(target=encode_often, args=[number]) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    for number, found in files.items():
        (only,) = found
        assert np.array_equal(pixels(only), np.asarray(images[number]))


def test_numpy_is_not_imported_before_there_is_a_picture() -> None:
    """The door imports this room before the weights are on their way, and they would wait for numpy."""
    program = "import images.encode, sys; print('numpy' in sys.modules)"

    said = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, check=True, capture_output=True, text=True
    )

    assert said.stdout.strip() == "False"
