"""The ways of encoding one RGB image that benchmarks/encoding.py measures: Pillow's, other libraries', and ours."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable
from typing import Any

import cv2
import deflate
import fpng
import numpy as np
import numpy.typing as npt
import simplejpeg
from isal import isal_zlib
from PIL import Image, PngImagePlugin
from zlib_ng import zlib_ng

from images.encode import encode

Encoder = Callable[[Image.Image], bytes]
Bytes = npt.NDArray[np.uint8]

BASELINE = "Pillow, level 1"
OURS = "**ours: Up, ISA-L level 1**"
Z_HUFFMAN_ONLY, Z_RLE = 2, 3  # zlib.h
NONE, SUB, UP, AVERAGE, PAETH = range(5)  # PNG 9.2


def ours(image: Image.Image) -> bytes:
    return encode(image, "png", 80, {}).data


def pillow(**options: Any) -> Encoder:
    def encoded(image: Image.Image) -> bytes:
        stream = io.BytesIO()
        image.save(stream, **options)
        return stream.getvalue()

    return encoded


def opencv(*options: int) -> Encoder:
    def encoded(image: Image.Image) -> bytes:
        pixels = cv2.cvtColor(np.asarray(image), cv2.COLOR_RGB2BGR)
        return bytes(cv2.imencode(".png", pixels, options)[1])

    return encoded


def turbojpeg(image: Image.Image) -> bytes:
    return bytes(
        simplejpeg.encode_jpeg(
            np.asarray(image), quality=80, colorspace="RGB", colorsubsampling="420"
        )
    )


def assembled(filter_type: int, deflated: Callable[[Bytes], bytes]) -> Encoder:
    """One filter for all rows, one library for what deflate takes from there."""

    def encoded(image: Image.Image) -> bytes:
        stream = io.BytesIO(b"\x89PNG\r\n\x1a\n")
        stream.seek(0, io.SEEK_END)
        header = struct.pack(">II5B", *image.size, 8, 2, 0, 0, 0)
        PngImagePlugin.putchunk(stream, b"IHDR", header)
        PngImagePlugin.putchunk(stream, b"IDAT", deflated(filtered(image, filter_type)))
        PngImagePlugin.putchunk(stream, b"IEND")
        return stream.getvalue()

    return encoded


def filtered(image: Image.Image, filter_type: int) -> Bytes:
    """PNG 9.2's filters, written for numpy: [height, 1 + 3 * width]."""
    width, height = image.size
    pixels = np.asarray(image).reshape(height, 3 * width)
    rows = np.empty((height, 1 + 3 * width), np.uint8)
    rows[:, 0] = filter_type
    left_over = rows[:, 1:]
    if filter_type == NONE:
        left_over[:] = pixels
    elif filter_type == SUB:
        left_over[:, :3] = pixels[:, :3]
        np.subtract(pixels[:, 3:], pixels[:, :-3], out=left_over[:, 3:])
    elif filter_type == UP:
        left_over[0] = pixels[0]
        np.subtract(pixels[1:], pixels[:-1], out=left_over[1:])
    else:
        padded = np.zeros((height + 1, 3 * (width + 1)), np.uint8)
        padded[1:, 3:] = pixels
        left, above, corner = padded[1:, :-3], padded[:-1, 3:], padded[:-1, :-3]
        prediction = average(left, above) if filter_type == AVERAGE else paeth(left, above, corner)
        np.subtract(pixels, prediction, out=left_over)
    return rows


def average(left: Bytes, above: Bytes) -> Bytes:
    """Rounded down, and without a ninth bit: what both have, and half of what one of them has."""
    return ((left ^ above) >> 1) + (left & above)


def paeth(left: Bytes, above: Bytes, corner: Bytes) -> Bytes:
    a, b, c = (part.astype(np.int16) for part in (left, above, corner))
    to_left, to_above, to_corner = np.abs(b - c), np.abs(a - c), np.abs(a + b - 2 * c)
    above_or_corner = np.where(to_above <= to_corner, above, corner)
    return np.where((to_left <= to_above) & (to_left <= to_corner), left, above_or_corner)


def isal(level: int) -> Callable[[Bytes], bytes]:
    return lambda rows: isal_zlib.compress(rows, level)


def zlibng(level: int, strategy: int = 0) -> Callable[[Bytes], bytes]:
    def deflated(rows: Bytes) -> bytes:
        stream = zlib_ng.compressobj(level, strategy=strategy)
        return bytes(stream.compress(rows) + stream.flush())

    return deflated


def libdeflate(level: int) -> Callable[[Bytes], bytes]:
    return lambda rows: bytes(deflate.zlib_compress(rows, level))


OPTIONS: dict[str, Encoder] = {
    BASELINE: pillow(format="PNG", compress_level=1),
    OURS: ours,
    "Pillow, level 0": pillow(format="PNG", compress_level=0),
    "Pillow, level 2": pillow(format="PNG", compress_level=2),
    "Pillow, level 3": pillow(format="PNG", compress_level=3),
    "Pillow, level 6 (its default)": pillow(format="PNG", compress_level=6),
    "Pillow, level 1, run lengths (Z_RLE)": pillow(
        format="PNG", compress_level=1, compress_type=Z_RLE
    ),
    "Pillow, level 1, Huffman only": pillow(
        format="PNG", compress_level=1, compress_type=Z_HUFFMAN_ONLY
    ),
    "OpenCV, its default (Sub, run lengths)": opencv(),
    "OpenCV, level 1": opencv(cv2.IMWRITE_PNG_COMPRESSION, 1),
    "fpng": lambda image: bytes(fpng.from_pil(image)),
    "no filter, ISA-L level 1": assembled(NONE, isal(1)),
    "Sub, ISA-L level 1": assembled(SUB, isal(1)),
    "Average, ISA-L level 1": assembled(AVERAGE, isal(1)),
    "Paeth, ISA-L level 1": assembled(PAETH, isal(1)),
    "Up, ISA-L level 0": assembled(UP, isal(0)),
    "Up, ISA-L level 2": assembled(UP, isal(2)),
    "Up, ISA-L level 3": assembled(UP, isal(3)),
    "Up, zlib-ng level 1": assembled(UP, zlibng(1)),
    "Up, zlib-ng level 2": assembled(UP, zlibng(2)),
    "Up, zlib-ng run lengths": assembled(UP, zlibng(1, Z_RLE)),
    "Up, zlib-ng Huffman only": assembled(UP, zlibng(1, Z_HUFFMAN_ONLY)),
    "Up, libdeflate level 1": assembled(UP, libdeflate(1)),
    "WebP q80, effort 0": pillow(format="WEBP", quality=80, method=0),
    "WebP q80, effort 1": pillow(format="WEBP", quality=80, method=1),
    "WebP q80, effort 2 (ours)": pillow(format="WEBP", quality=80, method=2),
    "WebP q80, effort 4 (Pillow's default)": pillow(format="WEBP", quality=80, method=4),
    "WebP q80, effort 6": pillow(format="WEBP", quality=80, method=6),
    "WebP q95, effort 0": pillow(format="WEBP", quality=95, method=0),
    "JPEG q80 (ours)": pillow(format="JPEG", quality=80),
    "JPEG q80, simplejpeg": turbojpeg,
    "JPEG q80, optimised": pillow(format="JPEG", quality=80, optimize=True),
    "JPEG q95": pillow(format="JPEG", quality=95),
}
