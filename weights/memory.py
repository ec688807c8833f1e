"""Host memory for tensors: each has its own bytes, which nobody else writes and which go back when it is let go.

The first touch of fresh memory costs as much as hashing it (0.5 s per GiB in pages of 4 KiB, measured; 0.17 in huge
pages), so a file's tensors lie in one mapping that asks for huge pages. They lie there as in the file, where alignment
allows it: then one read fills many, and a model of thousands of small ones comes in as fast as one of a few large.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import sys
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from weights.safetensors_layout import TensorPlace

ALIGNMENT = 64  # bytes; torch's own, for vector instructions


class Destination(Protocol):
    """Where tensors come to lie: host memory here, a card's memory elsewhere."""

    def reserve(self, path: str, places: Sequence[TensorPlace]) -> Sequence[Any]:
        """One target for each tensor of the file `path`, before any of its bytes arrive."""

    def put(
        self, parts: Sequence[tuple[Any, int, memoryview]], release: Callable[[], None]
    ) -> None:
        """Copy each part to its offset in its target; call `release` when the parts' memory may be used again.

        The same part may come again: its bytes were wrong the first time.
        """

    def hand_over(self, target: Any) -> Any:
        """The finished tensor's data. Nothing is put into it afterwards."""


@dataclass(frozen=True)
class HostTarget:
    """A tensor's memory in this process: `data` is a writable buffer of exactly its bytes, `offset` its place in the
    mapping `region`, which its neighbours share."""

    data: Any
    region: mmap.mmap
    offset: int


class HostMemory:
    """Tensors in this process's memory, one mapping a file."""

    def reserve(self, path: str, places: Sequence[TensorPlace]) -> list[HostTarget]:  # noqa: ARG002
        offsets = []
        total = 0
        for place in places:
            total = -(-total // ALIGNMENT) * ALIGNMENT
            offsets.append(total)
            total += place.end - place.start
        region = fresh_memory(max(total, 1))
        return [
            HostTarget(_owned(region, offset, place.end - place.start), region, offset)
            for offset, place in zip(offsets, places, strict=True)
        ]

    def put(
        self, parts: Sequence[tuple[HostTarget, int, memoryview]], release: Callable[[], None]
    ) -> None:
        for target, offset, piece in parts:
            start = target.offset + offset
            copy(memoryview(target.region)[start : start + len(piece)], piece)
        release()

    def hand_over(self, target: HostTarget) -> Any:
        return target.data


def copy(into: memoryview, piece: memoryview) -> None:
    """Copy bytes between buffers without holding the interpreter up: others import meanwhile."""
    if len(piece) < 4096:
        into[:] = piece
        return
    first = ctypes.c_char.from_buffer(into)
    second = ctypes.c_char.from_buffer(piece)
    ctypes.memmove(ctypes.byref(first), ctypes.byref(second), len(piece))


def fresh_memory(size: int) -> mmap.mmap:
    """Memory of its own, all zero, in huge pages where the system has them; given back when nobody refers to it."""
    region = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if sys.platform == "linux":
        with contextlib.suppress(OSError):  # a kernel without them
            region.madvise(mmap.MADV_HUGEPAGE)
    return region


def runs_of(
    places: Sequence[TensorPlace], targets: Sequence[HostTarget]
) -> list[tuple[int, memoryview]]:
    """What lies in memory as it does in the file: where each such run starts in the file, and its memory, in order."""
    runs = []
    first = 0
    for index in range(1, len(places) + 1):
        if index < len(places) and _follows(places, targets, index):
            continue
        start, end = places[first].start, places[index - 1].end
        if end > start:
            offset = targets[first].offset
            runs.append((start, memoryview(targets[first].region)[offset : offset + end - start]))
        first = index
    return runs


def _follows(places: Sequence[TensorPlace], targets: Sequence[HostTarget], index: int) -> bool:
    """Whether the tensor `index` has the same neighbour before it in memory as in the file."""
    before = places[index - 1]
    return (
        places[index].start == before.end
        and targets[index].offset == targets[index - 1].offset + before.end - before.start
    )


def _owned(region: mmap.mmap, offset: int, size: int) -> Any:
    """A part of the region as a buffer, whose pages go back to the system with it."""
    if not size:
        return bytearray()
    data = (ctypes.c_ubyte * size).from_buffer(region, offset)
    first = -(-offset // mmap.PAGESIZE) * mmap.PAGESIZE
    last = (offset + size) // mmap.PAGESIZE * mmap.PAGESIZE
    if last > first and sys.platform == "linux":
        weakref.finalize(data, _give_back, region, first, last - first).atexit = False
    return data


def _give_back(region: mmap.mmap, start: int, length: int) -> None:
    """A tensor is gone: so are its pages, though its neighbours in the mapping live on."""
    with contextlib.suppress(OSError, ValueError):
        region.madvise(mmap.MADV_DONTNEED, start, length)
