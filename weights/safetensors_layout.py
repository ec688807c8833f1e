"""Where each tensor lies in a safetensors file, read from its header alone.

The format: https://github.com/huggingface/safetensors#format. An 8-byte little-endian length, that many bytes of
JSON, then the tensors' bytes without holes. Nothing here touches the tensors themselves.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

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

# What a header claims, as far as a message should repeat it: a name may be 100 MB long.
_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 200
_brief = _REPR.repr


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
    base = len(header)
    try:
        # As UTF-8 and nothing else: given bytes, json would guess UTF-16 and UTF-32 as well.
        entries = json.loads(str(header[LENGTH_BYTES:], "utf-8"), object_pairs_hook=_no_name_twice)
        if not isinstance(entries, dict):
            raise TypeError("it is not a JSON object")
        places = [
            _place(name, entry, base, size)
            for name, entry in entries.items()
            if name != "__metadata__"
        ]
    except (ValueError, TypeError, RecursionError) as error:
        raise CorruptObjectError(
            f"{where} has a safetensors header that cannot be read ({error}). Publish the model again"
        ) from None
    places.sort(key=lambda place: (place.start, place.end))
    position = base
    for place in places:
        if place.start != position:
            raise CorruptObjectError(
                f"{where}: tensor {_brief(place.name)} does not begin where the one before it ends. "
                "Publish the model again"
            )
        position = place.end
    if position != size:
        raise CorruptObjectError(
            f"{where}: its tensors end at byte {position} of {size}. It was truncated or padded: "
            "publish the model again"
        )
    return tuple(places)


def _no_name_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The format forbids a name twice; json alone would keep the last, and another reader the first."""
    entries = dict(pairs)
    if len(entries) != len(pairs):
        raise ValueError("a name is in it twice")
    return entries


def _place(name: str, entry: Any, base: int, size: int) -> TensorPlace:
    """The place one entry of the header claims, if it lies in a file of `size` bytes. Raises ValueError, TypeError."""
    name.encode()  # a lone surrogate is no text, and no framework could ask for such a tensor
    if not isinstance(entry, dict):
        raise TypeError(f"tensor {_brief(name)} is described by {_brief(entry)}")
    dtype, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise ValueError(f"tensor {_brief(name)} has the unknown dtype {_brief(dtype)}")
    if not _are_lengths(shape):
        raise ValueError(f"tensor {_brief(name)} has the shape {_brief(shape)}")
    if (
        not _are_lengths(offsets)
        or len(offsets) != 2
        or not offsets[0] <= offsets[1] <= size - base
    ):
        raise ValueError(
            f"tensor {_brief(name)} has the data_offsets {_brief(offsets)} in a file of {size} bytes"
        )
    start, end = offsets
    if _count(shape, limit=size) * DTYPE_BYTES[dtype] != end - start:
        raise ValueError(
            f"tensor {_brief(name)} of shape {_brief(shape)} and dtype {dtype} has {end - start} bytes"
        )
    return TensorPlace(name, dtype, tuple(shape), base + start, base + end)


def _are_lengths(value: Any) -> TypeGuard[list[int]]:
    """Whether it is a list of whole numbers, none negative, and none of them 4.0, true or "4"."""
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _count(shape: list[int], limit: int) -> int:
    """How many elements `shape` has, or some number above `limit`: never more digits than a file has bytes for."""
    if 0 in shape:
        return 0
    count = 1
    for length in shape:
        count *= length
        if count > limit:
            break
    return count
