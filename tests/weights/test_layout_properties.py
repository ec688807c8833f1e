"""Whatever a bucket answers, a safetensors header is read right or refused in words.

The documents are random, or valid ones with anything in them altered. Runs are the same every time; what a random
search has found stands beside the property as an example.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import safetensors
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from tests.support.hostile_documents import (
    BYTES,
    DIGIT_LIMIT,
    PLAIN_TEXT,
    WHERE,
    Raw,
    altered,
    check_message,
    encoded,
    nested,
    reproducible,
    write,
)
from weights.errors import WeightsError
from weights.safetensors_layout import (
    DTYPE_BYTES,
    HEADER_LIMIT,
    LENGTH_BYTES,
    TensorPlace,
    _count,
    header_length,
    parse_header,
)


def framed(header: bytes, tail: bytes) -> bytes:
    return len(header).to_bytes(LENGTH_BYTES, "little") + header + tail


def check_layout(data: bytes) -> tuple[TensorPlace, ...] | None:
    """Refused in words, or tensors that fill the file exactly, where safetensors itself finds them."""
    try:
        length = header_length(data, WHERE, len(data))
        places = parse_header(memoryview(data)[:length], WHERE, len(data))
    except WeightsError as error:
        check_message(error)
        return None
    borders = [length, *(place.end for place in places)]
    assert [place.start for place in places] == borders[:-1]
    assert borders[-1] == len(data)
    for place in places:
        assert all(type(number) is int for number in (*place.shape, place.start, place.end))
        assert place.end - place.start == math.prod(place.shape) * DTYPE_BYTES[place.dtype]
    ours = {
        place.name: (place.dtype, place.shape, data[place.start : place.end]) for place in places
    }
    assert read_by_safetensors(data) in (ours, None)
    return places


def read_by_safetensors(data: bytes) -> dict[str, tuple[str, tuple[int, ...], bytes]] | None:
    """What safetensors itself finds in the file; None where it refuses it."""
    try:
        tensors = safetensors.deserialize(data)  # type: ignore[no-untyped-call]
    except safetensors.SafetensorError:
        return None
    return {
        name: (tensor["dtype"], tuple(tensor["shape"]), bytes(tensor["data"]))
        for name, tensor in tensors
    }


@st.composite
def headers(draw: st.DrawFn) -> dict[str, Any]:
    """A header that can be true, its tensors in any order, with every dtype there is."""
    names = draw(st.lists(PLAIN_TEXT, max_size=4, unique=True))
    header: dict[str, Any] = {}
    position = 0
    for name in names:
        dtype = draw(st.sampled_from(sorted(DTYPE_BYTES)))
        shape = draw(st.lists(st.integers(0, 3), max_size=3))
        end = position + math.prod(shape) * DTYPE_BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, end]}
        position = end
    if draw(st.booleans()):
        header["__metadata__"] = {"format": "pt"}
    return dict(draw(st.permutations(list(header.items()))))


def tensor_bytes(header: dict[str, Any]) -> int:
    offsets = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    return max(offsets, default=0)


def one_tensor(tail: bytes = b"1234", **changes: Any) -> bytes:
    entry = {"dtype": "U8", "shape": [len(tail)], "data_offsets": [0, len(tail)]} | changes
    return framed(write({"a": entry}).encode(), tail)


@given(BYTES, st.binary(max_size=8))
@example(b"\xff" * 20_000, b"")  # the message repeated every byte
@example(nested(100_000).encode(), b"")
@reproducible
def test_no_header_fails_without_words(header: bytes, tail: bytes) -> None:
    check_layout(framed(header, tail))
    check_layout(header)


@given(st.binary(max_size=16), st.integers(0, 2**70))
@example((HEADER_LIMIT + 1).to_bytes(8, "little"), 2**40)
@example(b"\xff" * 8, 2**64 + 7)
@reproducible
def test_a_header_ends_inside_its_file_or_is_refused(first: bytes, size: int) -> None:
    try:
        length = header_length(first, WHERE, size)
    except WeightsError as error:
        check_message(error)
    else:
        assert LENGTH_BYTES <= length <= min(size, LENGTH_BYTES + HEADER_LIMIT)


@given(headers(), st.data())
@settings(reproducible, max_examples=250)
def test_an_altered_header_is_refused_or_true(header: dict[str, Any], data: st.DataObject) -> None:
    size = max(0, tensor_bytes(header) + data.draw(st.sampled_from([0, 0, 0, 0, 1, -1, 4])))
    text = write(data.draw(altered(header)))

    check_layout(framed(data.draw(encoded(text)), bytes(size)))


@pytest.mark.parametrize(
    "data",
    [
        # The file's end had more digits than Python writes: ValueError while saying so.
        one_tensor(shape=[Raw("9" * DIGIT_LIMIT)], data_offsets=[0, Raw("9" * DIGIT_LIMIT)]),
        one_tensor(data_offsets=[4, 0]),
        one_tensor(shape=[2**62, 4, 4]),  # 2 to the 66, which is 4 when it wraps around at 64 bits
        one_tensor(shape=[-2, -2]),
        one_tensor(shape=Raw("[1,4.0]")),
        one_tensor(shape=[True, 4]),
        one_tensor(b"1", shape=""),  # was taken for a scalar's
        one_tensor(b"1", shape={}),
        one_tensor(dtype=[]),
        one_tensor(dtype="x" * 20_000),
        framed(write({"x" * 20_000: 3}).encode(), b""),
        framed(b'{"a":1,"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}', b"1234"),
        framed('{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}'.encode("utf-16"), b"1234"),
        framed(b'{"\\ud800":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}', b"1234"),
    ],
    ids=range(14),
)
def test_a_header_that_was_believed_or_broke_the_reader_is_refused(data: bytes) -> None:
    assert check_layout(data) is None


def test_a_shape_is_not_multiplied_beyond_what_its_file_could_hold() -> None:
    # 23,000 such lengths fit into a header, and their product has a hundred million digits.
    length = 10 ** (DIGIT_LIMIT - 1)

    assert _count([length] * 23_000, limit=1000) == length
    assert _count([length] * 23_000 + [0], limit=1000) == 0
    assert check_layout(one_tensor(shape=[length] * 200)) is None


@given(headers())
@reproducible
def test_a_true_header_is_read_as_it_was_written(header: dict[str, Any]) -> None:
    data = framed(write(header).encode(), bytes(tensor_bytes(header)))

    places = check_layout(data)

    assert places is not None
    assert {place.name: (place.dtype, list(place.shape)) for place in places} == {
        name: (entry["dtype"], entry["shape"])
        for name, entry in header.items()
        if name != "__metadata__"
    }
    assert read_by_safetensors(data) is not None


DTYPES = ["float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint8", "bool"]
SHAPES = st.lists(st.integers(0, 4), max_size=3)
ARRAYS = st.builds(
    lambda dtype, shape: np.arange(math.prod(shape)).astype(dtype).reshape(shape),
    st.sampled_from(DTYPES),
    SHAPES,
)


@given(st.dictionaries(PLAIN_TEXT, ARRAYS, max_size=4))
@reproducible
def test_what_safetensors_saves_lies_where_it_says(tensors: dict[str, Any]) -> None:
    data = save(tensors, metadata={"format": "pt"})

    places = check_layout(data)

    assert places is not None
    assert {place.name: data[place.start : place.end] for place in places} == {
        name: tensor.tobytes() for name, tensor in tensors.items()
    }
