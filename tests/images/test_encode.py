"""Encoding keeps the picture and says how it was made, in every format."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from PIL import ExifTags, Image

from images.encode import CONTENT_TYPES, encode, read_metadata
from images.errors import ImagesError
from images.provenance import Provenance

FORMATS = sorted(CONTENT_TYPES)


def picture(width: int = 96, height: int = 64) -> Image.Image:
    y, x = np.mgrid[0:height, 0:width]
    channels = np.stack([x * 255 // width, y * 255 // height, (x + y) % 256], axis=-1)
    return Image.fromarray(channels.astype(np.uint8))


def provenance(prompt: str, **changes: object) -> Provenance:
    values: dict[str, object] = {
        "prompt": prompt,
        "negative_prompt": "blurry",
        "seed": 2**63 - 1,
        "steps": 4,
        "guidance_scale": 0.1 + 0.2,
        "width": 96,
        "height": 64,
        "model": "ByteDance/SDXL-Lightning",
        "version": "0f3c" * 8,
    }
    return Provenance(**(values | changes))  # type: ignore[arg-type]


PROMPTS = {
    "plain": "an astronaut riding a horse",
    "latin-1": "café à côté, naïve Ærøskøbing",
    "emoji": "a cat 🐈‍⬛ on the moon 🌙",
    "japanese": "富士山の夜明け",
    "line breaks": "first line\nsecond line\r\n\tthird, indented",
    "control characters": "bell \x07, escape \x1b[31m, delete \x7f",
    "markup and quotes": 'a "quoted" <tag attr=\'1\'> & {"seed": "7"} \\n \\u0041',
    "ten thousand characters": "word " * 2000,
    "ten thousand emoji": "🐈" * 10_000,
}


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS)
def test_an_image_says_exactly_how_to_make_it_again(format: str, prompt: str) -> None:
    made = provenance(prompt)

    encoded = encode(picture(), format, 80, made.as_text())

    assert Provenance.from_text(read_metadata(encoded.data)) == made


@pytest.mark.parametrize("format", FORMATS)
def test_weights_in_the_prompt_are_said_only_where_they_were_read(format: str) -> None:
    weighted = provenance("a (red fox)1.3", prompt_weighting=True)
    plain = provenance("a (red fox)1.3")

    kept, without = (
        read_metadata(encode(picture(), format, 80, made.as_text()).data)
        for made in (weighted, plain)
    )

    assert kept["prompt_weighting"] == "true"
    assert Provenance.from_text(kept) == weighted
    # As a file has it that was made before there were weights.
    assert "prompt_weighting" not in without
    assert Provenance.from_text(without) == plain


def test_a_switch_that_says_neither_is_refused() -> None:
    with pytest.raises(ImagesError, match="prompt_weighting is 'maybe'"):
        Provenance.from_text(provenance("a").as_text() | {"prompt_weighting": "maybe"})


@pytest.mark.parametrize("format", FORMATS)
def test_what_no_format_can_hold_is_dropped_and_the_rest_kept(format: str) -> None:
    entries = {"prompt": "a\0b \ud83d c", "negative_prompt": "", "seed": "0"}

    encoded = encode(picture(), format, 80, entries)

    assert read_metadata(encoded.data) == {"prompt": "ab \ufffd c", "seed": "0"}


@pytest.mark.parametrize("format", FORMATS)
def test_the_file_is_what_its_content_type_and_extension_say(format: str) -> None:
    encoded = encode(picture(), format, 80, {})

    assert encoded.extension == format
    with Image.open(io.BytesIO(encoded.data)) as image:
        image.load()
        assert (image.get_format_mimetype(), image.size) == (encoded.content_type, (96, 64))


def test_png_text_is_where_any_other_tool_looks_for_it() -> None:
    data = encode(picture(), "png", 80, provenance("a cat").as_text()).data

    assert b"tEXtprompt\0a cat" in data
    assert b"tEXtsize\x0096x64" in data
    assert data.index(b"tEXt") < data.index(b"IDAT")


def test_exif_holds_one_json_object_as_the_standard_wants_it() -> None:
    data = encode(picture(), "jpg", 80, {"prompt": "é🐈", "seed": "1"}).data

    with Image.open(io.BytesIO(data)) as image:
        exif = image.getexif()
        comment = exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment]
    assert comment.startswith(b"UNICODE\0")
    assert json.loads(comment[8:].decode("utf-16-be")) == {"prompt": "é🐈", "seed": "1"}


def test_exif_rewritten_in_the_other_byte_order_is_still_read() -> None:
    exif = Image.Exif()
    exif.endian = "<"
    comment = b"UNICODE\0" + json.dumps({"prompt": "é🐈"}, ensure_ascii=False).encode("utf-16-le")
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = comment
    stream = io.BytesIO()
    picture().save(stream, "WEBP", exif=exif)

    assert read_metadata(stream.getvalue()) == {"prompt": "é🐈"}


@pytest.mark.parametrize("prompt", ["x" * 1_000_000, "🐈" * 100_000, "\x01" * 30_000])
def test_a_prompt_too_long_for_a_jpeg_is_shortened_and_says_so(prompt: str) -> None:
    made = provenance(prompt)

    entries = read_metadata(encode(picture(), "jpg", 80, made.as_text()).data)

    assert entries["shortened"] == "prompt"
    assert prompt.startswith(entries["prompt"])
    assert len(entries["prompt"]) > 4000
    kept = set(made.as_text()) - {"prompt"}
    assert {name: entries[name] for name in kept} == {name: made.as_text()[name] for name in kept}


def test_two_long_values_both_fit_into_a_jpeg_in_part() -> None:
    made = provenance("x" * 200_000, negative_prompt="y" * 200_000)

    entries = read_metadata(encode(picture(), "jpg", 80, made.as_text()).data)

    assert set(entries["shortened"].split(", ")) == {"prompt", "negative_prompt"}
    assert entries["seed"] == str(2**63 - 1)


@pytest.mark.parametrize("format", ["webp", "jpg"])
def test_quality_decides_the_size_of_lossy_formats(format: str) -> None:
    sizes = [len(encode(picture(), format, quality, {}).data) for quality in (0, 50, 100)]

    assert sizes == sorted(sizes)
    assert len(set(sizes)) == 3


def test_quality_leaves_png_alone() -> None:
    assert encode(picture(), "png", 0, {}).data == encode(picture(), "png", 100, {}).data


@pytest.mark.parametrize("quality", [-1, 101])
def test_a_quality_out_of_range_is_refused(quality: int) -> None:
    with pytest.raises(ImagesError, match="choose 0 to 100"):
        encode(picture(), "webp", quality, {})


def test_an_unknown_format_is_refused_with_those_that_exist() -> None:
    with pytest.raises(ImagesError, match="'gif': choose one of png, webp, jpg"):
        encode(picture(), "gif", 80, {})


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "I;16"])
@pytest.mark.parametrize("format", FORMATS)
def test_pixels_that_are_not_rgb_are_refused(format: str, mode: str) -> None:
    with pytest.raises(ImagesError, match=f"of mode {mode}: convert it to RGB"):
        encode(Image.new(mode, (8, 8)), format, 80, {})


@pytest.mark.parametrize("name", ["", "x" * 80, "naïve ", "a\0b", "日本"])
def test_a_name_that_png_cannot_hold_is_refused(name: str) -> None:
    with pytest.raises(ImagesError, match="cannot name an image's metadata"):
        encode(picture(), "png", 80, {name: "value"})


@pytest.mark.parametrize("format", ["PNG", "WEBP", "JPEG"])
def test_somebody_else_s_image_has_no_metadata(format: str) -> None:
    stream = io.BytesIO()
    picture().save(stream, format)

    assert read_metadata(stream.getvalue()) == {}
    with pytest.raises(ImagesError, match="does not say how it was made"):
        Provenance.from_text(read_metadata(stream.getvalue()))


@pytest.mark.parametrize("comment", [b"ASCII\0\0\0hello", b"UNICODE\0x", b"UNICODE\0\0[\x001\0]"])
def test_somebody_else_s_comment_is_not_ours(comment: bytes) -> None:
    exif = Image.Exif()
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = comment
    stream = io.BytesIO()
    picture().save(stream, "JPEG", exif=exif)

    assert read_metadata(stream.getvalue()) == {}


@pytest.mark.parametrize("cut", [0, 1, 20, 60])
def test_half_a_file_is_refused_with_a_reason(cut: int) -> None:
    data = encode(picture(), "png", 80, provenance("a cat").as_text()).data

    with pytest.raises(ImagesError, match="Is it a whole PNG, WebP or JPEG file"):
        read_metadata(data[:cut])
