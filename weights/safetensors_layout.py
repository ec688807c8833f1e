"""Where each tensor lies in a safetensors file, read from its header alone.

The format: https://github.com/huggingface/safetensors#format. An 8-byte little-endian length, that many bytes of
JSON, then the tensors' bytes without holes. Nothing here touches the tensors themselves.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from weights.errors import CorruptObjectError

LENGTH_BYTES = 8
HEADER_LIMIT = 100_000_000  # bytes; the format's own limit
DTYPE_BYTES: Mapping[str, int] = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}


@dataclass(frozen=True)
class TensorPlace:
    """A tensor's name, safetensors dtype, shape, and its bytes' place [start, end) in the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def header_length(first_bytes: bytes | memoryview, where: str, size: int) -> int:
    """Bytes from the file's start to its first tensor. Raises CorruptObjectError if that cannot be right."""
    length = int.from_bytes(first_bytes[:LENGTH_BYTES], "little")
    if size < LENGTH_BYTES or length > HEADER_LIMIT or LENGTH_BYTES + length > size:
        raise CorruptObjectError(
            f"{where} is not a safetensors file: its header would be {length} bytes long. Publish the model again"
        )
    return LENGTH_BYTES + length


def parse_header(header: bytes | memoryview, where: str, size: int) -> tuple[TensorPlace, ...]:
    """The places of all tensors, in file order, from the file's first `header_length` bytes.

    Raises CorruptObjectError when the header is not valid or its tensors do not fill the file exactly.
    """
    try:
        entries = json.loads(bytes(header[LENGTH_BYTES:]))
        places = [
            _place(name, entry, base=len(header))
            for name, entry in entries.items()
            if name != "__metadata__"
        ]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CorruptObjectError(
            f"{where} has a safetensors header that cannot be read ({error!r}). Publish the model again"
        ) from None
    places.sort(key=lambda place: (place.start, place.end))
    position = len(header)
    for place in places:
        if place.start != position:
            raise CorruptObjectError(
                f"{where}: tensor {place.name!r} does not begin where the one before it ends. Publish the model again"
            )
        position = place.end
    if position != size:
        raise CorruptObjectError(
            f"{where}: its tensors end at byte {position} of {size}. It was truncated or padded: "
            "publish the model again"
        )
    return tuple(places)


def _place(name: str, entry: Mapping[str, Any], base: int) -> TensorPlace:
    shape = tuple(_whole(length) for length in entry["shape"])
    start, end = (_whole(offset) for offset in entry["data_offsets"])
    dtype = entry["dtype"]
    if dtype not in DTYPE_BYTES:
        raise ValueError(f"tensor {name!r} has the unknown dtype {dtype!r}")
    if min(shape, default=0) < 0 or end - start != math.prod(shape) * DTYPE_BYTES[dtype]:
        raise ValueError(
            f"tensor {name!r} of shape {shape} and dtype {dtype} has {end - start} bytes"
        )
    return TensorPlace(name, dtype, shape, base + start, base + end)


def _whole(number: Any) -> int:
    if type(number) is not int:  # neither 4.0 nor true nor "4"
        raise TypeError(f"{number!r} is not a whole number")
    return number
