"""Headers that real safetensors files have, and headers that lie."""

import json

import numpy as np
import pytest
from safetensors.numpy import save

from weights.errors import CorruptObjectError
from weights.safetensors_layout import header_length, parse_header


def layout(data: bytes, size: int | None = None):
    size = len(data) if size is None else size
    return parse_header(data[: header_length(data, "s3://b/x", size)], "s3://b/x", size)


def with_header(header: dict[str, object], tail: bytes = b"") -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + tail


def test_places_are_where_safetensors_wrote_the_tensors():
    tensors = {
        "a": np.arange(6, dtype="float32").reshape(2, 3),
        "empty": np.zeros((0, 4), dtype="float16"),
        "scalar": np.array(7, dtype="int64"),
        "half": np.arange(5, dtype="float16"),
    }
    data = save(tensors, metadata={"format": "pt"})
    places = {place.name: place for place in layout(data)}
    assert places.keys() == tensors.keys()
    for name, place in places.items():
        assert place.shape == tensors[name].shape
        assert data[place.start : place.end] == tensors[name].tobytes()


def tensor(start: int, end: int, **changes: object) -> dict[str, object]:
    return {"dtype": "U8", "shape": [end - start], "data_offsets": [start, end]} | changes


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x01\x02",
        (2**40).to_bytes(8, "little") + b"{}",
        (100).to_bytes(8, "little") + b"{}",
        with_header({"a": tensor(0, 4)}, b"123"),
        with_header({"a": tensor(0, 4)}, b"12345"),
        with_header({"a": tensor(1, 4)}, b"1234"),
        with_header({"a": tensor(0, 4), "b": tensor(2, 6)}, b"123456"),
        with_header({"a": tensor(0, 4, shape=[5])}, b"1234"),
        with_header({"a": tensor(0, 4, shape=[-4])}, b"1234"),
        with_header({"a": tensor(0, 4, dtype="PICKLE")}, b"1234"),
        with_header({"a": tensor(0, 4, shape=[4.0])}, b"1234"),
        with_header({"a": tensor(0, 4, shape=["4"])}, b"1234"),
        with_header({"a": {"dtype": "U8"}}),
        (100_000).to_bytes(8, "little") + b"[" * 100_000,
        with_header({"a": 3}),
        (3).to_bytes(8, "little") + b"[1]",
        (3).to_bytes(8, "little") + b"{{{",
        (2).to_bytes(8, "little") + b"\xff\xff",
    ],
)
def test_a_header_that_cannot_be_true_is_refused_naming_the_object(data):
    with pytest.raises(CorruptObjectError, match="s3://b/x"):
        layout(data)
