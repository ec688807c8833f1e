"""A Pillow image to bytes and back to its metadata: PNG, WebP and JPEG, each carrying how it was made.

PNG holds one text chunk per entry: tEXt where Latin-1 is enough, iTXt elsewhere. WebP and JPEG know no such
chunks; there the entries are one JSON object in EXIF's UserComment, which survives most tools that copy EXIF.
What the entries mean is provenance.py's business, where the bytes go is store.py's.
"""

from __future__ import annotations

import bisect
import io
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from PIL import ExifTags, Image, PngImagePlugin

from images.errors import ImagesError
from images.png import png_file

# Measured by benchmarks/encoding.py on four kinds of 1024² pictures, all in the same run: effort 2 takes half the
# time of effort 4, Pillow's default (24 to 53 ms instead of 52 to 107), for at most 0.5 dB less and 2 to 13 % more
# bytes. Effort 0 takes 0.6 of that again, for up to 40 % more bytes.
WEBP_OPTIONS = {"method": 2}

CONTENT_TYPES: dict[str, str] = {"png": "image/png", "webp": "image/webp", "jpg": "image/jpeg"}

# PNG 11.3.2: a keyword is 1 to 79 characters of printable Latin-1 without spaces at its ends; ours stay plainer.
_KEYWORD = re.compile(r"[A-Za-z0-9_.-](?:[A-Za-z0-9_. -]{0,77}[A-Za-z0-9_.-])?")
# EXIF 2.32, 4.6.5: UserComment opens with its character code; UNICODE is UTF-16 in the byte order of the rest,
# which we make big-endian.
_UNICODE = b"UNICODE\0"
_JPEG_EXIF_LIMIT = 65_533  # a marker segment's length field is 16 bits and counts itself
SHORTENED = "shortened"  # the entry that names what did not fit into a JPEG


@dataclass(frozen=True)
class EncodedImage:
    """A finished file: its bytes, its media type, and its name's extension without the dot."""

    data: bytes
    content_type: str
    extension: str


def encode(
    image: Image.Image, format: str, quality: int, metadata: Mapping[str, str]
) -> EncodedImage:
    """Encode an RGB image as "png", "webp" or "jpg"; `quality`, 0 to 100, is for WebP and JPEG (PNG loses nothing).

    Entries of `metadata` with an empty value are left out. NULs are dropped from values (no PNG text can hold
    one) and lone surrogates become U+FFFD; everything else, line breaks included, comes back from
    `read_metadata` as it went in. In a JPEG the entries share 64 KiB; what exceeds them is cut from the longest
    values, and an entry `shortened` names those.

    Raises ImagesError for an unknown format, a quality out of range, pixels that are not RGB or a name that PNG
    cannot hold.
    """
    if format not in CONTENT_TYPES:
        known = ", ".join(CONTENT_TYPES)
        raise ImagesError(f"cannot encode an image as {format!r}: choose one of {known}")
    if not 0 <= quality <= 100:
        raise ImagesError(f"cannot encode an image with quality {quality}: choose 0 to 100")
    if image.mode != "RGB":
        raise ImagesError(f"cannot encode an image of mode {image.mode}: convert it to RGB")
    entries = _cleaned(metadata)
    options: dict[str, Any]
    if format == "png":
        return EncodedImage(png_file(image, _png_text(entries)), CONTENT_TYPES[format], format)
    if format == "webp":
        options = {"format": "WEBP", "quality": quality, "exif": _exif(entries), **WEBP_OPTIONS}
    else:
        options = {"format": "JPEG", "quality": quality, "exif": _fitting_exif(entries)}
    stream = io.BytesIO()
    image.save(stream, **options)
    return EncodedImage(stream.getvalue(), CONTENT_TYPES[format], format)


def read_metadata(data: bytes) -> dict[str, str]:
    """The entries `encode` put into an image file; {} for an image of somebody else's.

    Raises ImagesError when the bytes are no image that Pillow can read.
    """
    try:
        with Image.open(io.BytesIO(data), formats=["PNG", "WEBP", "JPEG"]) as image:
            if isinstance(image, PngImagePlugin.PngImageFile):
                return {str(name): str(value) for name, value in image.text.items()}
            exif = image.getexif().get_ifd(ExifTags.IFD.Exif)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ImagesError(
            f"cannot read an image's metadata: {error}. Is it a whole PNG, WebP or JPEG file?"
        ) from error
    return _from_comment(exif.get(ExifTags.Base.UserComment))


def _cleaned(metadata: Mapping[str, str]) -> dict[str, str]:
    entries = {}
    for name, value in metadata.items():
        if not _KEYWORD.fullmatch(name):
            raise ImagesError(
                f"cannot name an image's metadata {name!r}: use 1 to 79 letters, digits and . _ - or spaces inside"
            )
        value = (
            value.replace("\0", "").encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        )
        if value:
            entries[name] = value
    return entries


def _png_text(entries: Mapping[str, str]) -> PngImagePlugin.PngInfo:
    info = PngImagePlugin.PngInfo()
    for name, value in entries.items():
        info.add_text(name, value)  # Pillow takes tEXt where Latin-1 suffices, else iTXt
    return info


def _exif(entries: Mapping[str, str]) -> bytes:
    if not entries:
        return b""
    exif = Image.Exif()
    exif.endian = ">"
    text = json.dumps(dict(entries), ensure_ascii=False, separators=(",", ":"))
    comment = _UNICODE + text.encode("utf-16-be")
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = comment
    return exif.tobytes()


def _fitting_exif(entries: Mapping[str, str]) -> bytes:
    """EXIF of at most one JPEG segment. An image with half a prompt is better than no image."""
    encoded = _exif(entries)
    if len(encoded) <= _JPEG_EXIF_LIMIT:
        return encoded
    lengths = range(_JPEG_EXIF_LIMIT // 2)  # a character takes at least two bytes
    too_long = bisect.bisect_right(
        lengths, _JPEG_EXIF_LIMIT, key=lambda length: len(_exif(_shortened(entries, length)))
    )
    return _exif(_shortened(entries, max(too_long - 1, 0)))


def _shortened(entries: Mapping[str, str], length: int) -> dict[str, str]:
    """All values cut to one length, so that the short ones, which say the most for their size, stay whole."""
    cut = [name for name, value in entries.items() if len(value) > length]
    return {name: value[:length] for name, value in entries.items()} | {SHORTENED: ", ".join(cut)}


def _from_comment(comment: object) -> dict[str, str]:
    if not isinstance(comment, bytes) or not comment.startswith(_UNICODE):
        return {}
    text = comment.removeprefix(_UNICODE)
    # A tool that rewrites EXIF may change its byte order and leave the comment: our first character tells.
    encoding = "utf-16-le" if text.startswith(b"{\0") else "utf-16-be"
    try:
        entries = json.loads(text.decode(encoding))
    except ValueError:
        return {}
    if not isinstance(entries, dict):
        return {}
    return {name: value for name, value in entries.items() if isinstance(value, str)}
