"""Verified chunks become files: small ones whole, weight files tensor by tensor as soon as each is complete."""

from __future__ import annotations

import bisect
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from weights.chunks import Chunk, SnapshotFile, chunk_count
from weights.memory import Destination, HostTarget, copy, fresh_memory, runs_of
from weights.safetensors_layout import LENGTH_BYTES, TensorPlace, header_length, parse_header


@dataclass(frozen=True)
class LandedTensor:
    """A verified tensor of the file `path`, with `data` as its destination made it.

    In host memory that is a writable buffer of exactly its bytes, owned by it alone. `dtype` is safetensors' name for
    it ("F16", "BF16", "F32", …).
    """

    path: str
    name: str
    dtype: str
    shape: tuple[int, ...]
    data: Any


class WholeFile:
    """A small file on its way into bytes."""

    def __init__(self, file: SnapshotFile) -> None:
        self.file = file
        self.data = bytearray(file.size)
        self._view = memoryview(self.data)
        self._missing = file.size
        self.done = threading.Event()  # whole, or given up
        if not file.size:
            self.done.set()

    @property
    def complete(self) -> bool:
        return not self._missing

    def room(self, chunk: Chunk, offset: int) -> memoryview:
        return self._view[chunk.start + offset : chunk.end]

    def put(
        self, chunk: Chunk, offset: int, piece: memoryview, release: Callable[[], None]
    ) -> None:
        copy(self.room(chunk, offset)[: len(piece)], piece)
        release()

    def landed(self, chunk: Chunk) -> None:
        self._missing -= chunk.length
        if not self._missing:
            self.done.set()


class WeightFile:
    """A safetensors file on its way into tensors; `on_tensor` is told of each, as it becomes complete.

    What arrives before the header is known (the file's first chunk, and what else a very long header spans) waits in
    memory of its own and is copied; all else goes where it stays.
    """

    def __init__(
        self,
        file: SnapshotFile,
        where: str,
        destination: Destination,
        on_tensor: Callable[[LandedTensor], None],
    ) -> None:
        self.file = file
        self._where = where
        self._destination = destination
        self._on_tensor = on_tensor
        self._lock = threading.Lock()
        self._waiting: dict[int, memoryview] = {}  # by chunk, until the header is known
        self._arrived: dict[int, Chunk] = {}
        self._places: tuple[TensorPlace, ...] | None = None
        self._ends: list[int] = []
        self._targets: Sequence[Any] = ()
        self._missing: list[int] = []  # bytes, of each tensor
        self._run_starts: list[int] = []  # in host memory: what lies there as in the file
        self._runs: list[memoryview] = []
        self._left = 0  # tensors not handed over

    def room(self, chunk: Chunk, offset: int) -> memoryview:
        """Memory for the chunk's bytes from `offset` on; only for host memory."""
        with self._lock:
            if self._places is None or chunk.index in self._waiting:
                return self._early(chunk)[offset:]
            position = chunk.start + offset
            number = bisect.bisect_right(self._run_starts, position) - 1
            if number < 0 or not self._runs:
                raise TypeError(
                    "only host memory can be read into directly, and only where tensors lie"
                )
            start = self._run_starts[number]
            return self._runs[number][position - start : chunk.end - start]

    def put(
        self, chunk: Chunk, offset: int, piece: memoryview, release: Callable[[], None]
    ) -> None:
        """Copy a piece of a chunk to where it belongs; `release` is called when the piece's memory is free again."""
        with self._lock:
            early = self._places is None or chunk.index in self._waiting
            if early:
                data = self._early(chunk)
        if early:
            copy(data[offset : offset + len(piece)], piece)
            release()
            return
        start = chunk.start + offset
        self._destination.put(self._parts(start, start + len(piece), piece), release)

    def landed(self, chunk: Chunk) -> None:
        """The chunk is verified. Raises CorruptObjectError when the header in it makes no sense."""
        with self._lock:
            if self._places is None:
                self._arrived[chunk.index] = chunk
                if not self._read_header():
                    return
                complete = [index for index, size in enumerate(self._missing) if not size]
                for early in list(self._arrived.values()):
                    complete += self._copy_early(early)
            elif chunk.index in self._waiting:
                complete = self._copy_early(chunk)
            else:
                complete = self._count(chunk.start, chunk.end)
        for index in complete:
            self._hand_over(index)

    def _early(self, chunk: Chunk) -> memoryview:
        """Where a chunk waits for the header."""
        if chunk.index not in self._waiting:
            self._waiting[chunk.index] = memoryview(fresh_memory(chunk.length))
        return self._waiting[chunk.index]

    def _read_header(self) -> bool:
        """Find out where the tensors lie, once all of the header is there."""
        if 0 not in self._arrived:
            return False
        length = header_length(self._waiting[0][:LENGTH_BYTES], self._where, self.file.size)
        spanned = range(chunk_count(length))
        if not all(index in self._arrived for index in spanned):
            return False
        head = b"".join(self._waiting[index] for index in spanned[:-1])
        head += self._waiting[spanned[-1]][: length - len(head)]
        places = parse_header(head, self._where, self.file.size)
        self._targets = self._destination.reserve(self.file.path, places)
        self._ends = [place.end for place in places]
        self._missing = [place.end - place.start for place in places]
        self._left = len(places)
        if all(isinstance(target, HostTarget) for target in self._targets):
            runs = runs_of(places, self._targets)
            self._run_starts = [start for start, _ in runs]
            self._runs = [memory for _, memory in runs]
        self._places = places  # last: from here on there is room for everybody
        return True

    def _copy_early(self, chunk: Chunk) -> list[int]:
        """Move what waited for the header to its tensors; the numbers of those that are complete with it."""
        data = self._waiting.pop(chunk.index)
        done = threading.Event()
        parts = self._parts(chunk.start, chunk.end, data)
        self._destination.put(parts, done.set)
        done.wait()
        return self._count(chunk.start, chunk.end)

    def _parts(self, start: int, end: int, piece: memoryview) -> list[tuple[Any, int, memoryview]]:
        """The file's bytes [start, end), which `piece` holds, cut into the tensors they belong to."""
        places = self._places or ()
        parts = []
        for index in range(bisect.bisect_right(self._ends, start), len(places)):
            place = places[index]
            if place.start >= end:
                break
            first, last = max(start, place.start), min(end, place.end)
            if last > first:
                part = piece[first - start : last - start]
                parts.append((self._targets[index], first - place.start, part))
        return parts

    def _count(self, start: int, end: int) -> list[int]:
        """Note that [start, end) is there; the numbers of the tensors that are complete with it."""
        places = self._places or ()
        complete = []
        for index in range(bisect.bisect_right(self._ends, start), len(places)):
            place = places[index]
            if place.start >= end:
                break
            count = min(end, place.end) - max(start, place.start)
            if count > 0:
                self._missing[index] -= count
                if not self._missing[index]:
                    complete.append(index)
        return complete

    def _hand_over(self, index: int) -> None:
        with self._lock:
            assert self._places is not None  # noqa: S101 - tensors are counted only once the places are known
            place = self._places[index]
            target = self._targets[index]
            self._targets[index] = None  # type: ignore[index] # whoever has the tensor has it alone
            self._left -= 1
            if not self._left:
                self._runs.clear()
        data = self._destination.hand_over(target)
        self._on_tensor(LandedTensor(self.file.path, place.name, place.dtype, place.shape, data))


class Landings:
    """Every file of one load by its path, as a sink for a fetcher in this process."""

    def __init__(self, files: Mapping[str, WholeFile | WeightFile]) -> None:
        self._files = files

    def room(self, chunk: Chunk, offset: int) -> memoryview:
        return self._files[chunk.file.path].room(chunk, offset)

    def filled(self, chunk: Chunk, offset: int, count: int) -> None:
        """Nothing to do: the bytes are where they belong."""

    def landed(self, chunk: Chunk) -> None:
        self._files[chunk.file.path].landed(chunk)

    def leave(self) -> None:
        """Nothing to do: no thread holds anything."""
