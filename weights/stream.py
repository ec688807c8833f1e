"""A model on its way from the bucket into memory: tensors come out, verified, in the order they land.

Every tensor gets memory of its own before its bytes arrive; a chunk is read straight into the tensors it belongs
to and hashed there, and a tensor is handed over once all its chunks have been verified. The stream keeps no
reference to what it has handed over.
"""

from __future__ import annotations

import bisect
import mmap
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from weights.bucket import Bucket
from weights.errors import WeightsError
from weights.reader import ChunkReader
from weights.safetensors_layout import LENGTH_BYTES, TensorPlace, header_length, parse_header
from weights.snapshot import Chunk, Snapshot, SnapshotFile, find_snapshot

DEFAULT_CONNECTIONS = 16
MAPPED_FROM = 64 * 1024  # bytes; below that a bytearray is cheaper than a mapping of its own


@dataclass(frozen=True)
class LandedTensor:
    """A verified tensor of the file `path`: `data` is a writable buffer of exactly its bytes, owned by it alone.

    `dtype` is safetensors' name for it ("F16", "BF16", "F32", …).
    """

    path: str
    name: str
    dtype: str
    shape: tuple[int, ...]
    data: Any


def open_model(
    bucket: Bucket,
    model_path: str,
    version: str | None = None,
    *,
    connections: int = DEFAULT_CONNECTIONS,
) -> ModelStream:
    """Find the model (raising what `find_snapshot` raises) and start reading it at once."""
    return ModelStream(bucket, find_snapshot(bucket, model_path, version), connections=connections)


class ModelStream:
    """One model being read over `connections` connections. A context manager; leaving it stops the reading.

    `configs()` gives the small files and `tensors()` the weights. Both raise what went wrong while reading.
    """

    def __init__(
        self, bucket: Bucket, snapshot: Snapshot, *, connections: int = DEFAULT_CONNECTIONS
    ) -> None:
        self.snapshot = snapshot
        self.bytes_read = 0
        self.started = time.monotonic()
        self.seconds: float | None = None  # from the start to the last verified byte
        self._bucket = bucket
        self._stopped = threading.Event()
        self._reader = ChunkReader(bucket, self._stopped)
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(connections, thread_name_prefix="weights")
        self._pending = 1  # this constructor counts as a task, so that nothing finishes before it
        self._landed: queue.SimpleQueue[LandedTensor | None] = queue.SimpleQueue()
        self._error: BaseException | None = None
        # Small files first, since the pipeline is built from them; then every weight file's head, which says where
        # its tensors lie; the rest of a file queues up when its head has landed.
        files = [file for file in snapshot.files if file.is_weights or file.is_config]
        self.total_bytes = sum(file.size for file in files)
        self._configs = {
            file.path: self._start(self._read_whole, file) for file in files if file.is_config
        }
        for file in files:
            if file.is_weights:
                self._start(self._read_head, file)
        self._task_done()

    @property
    def version(self) -> str:
        return self.snapshot.version

    @property
    def recipe(self) -> Mapping[str, Any] | None:
        """The recipe the model was published with; None for a bare folder."""
        return self.snapshot.recipe

    def configs(self) -> dict[str, bytes]:
        """Every config file, by its path; waits for the last of them. Raises WeightsError."""
        try:
            return {path: future.result() for path, future in self._configs.items()}
        except CancelledError:
            self._raise_error()
            raise

    def tensors(self) -> Iterator[LandedTensor]:
        """Every tensor once, as it lands. Raises WeightsError; what landed before that is then of no use."""
        while (tensor := self._landed.get()) is not None:
            yield tensor
            # The consumer may have let go of it: hold on to nothing while waiting for the next.
            del tensor
        self._landed.put(None)  # for whoever asks again
        self._raise_error()

    def close(self) -> None:
        """Stop reading and wait for the threads. Harmless when all has been read."""
        self._close(wait=True)

    def __enter__(self) -> ModelStream:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # After Ctrl-C nobody waits: a thread may be stuck on a server that says nothing.
        self._close(wait=kind is not KeyboardInterrupt)

    def _close(self, *, wait: bool) -> None:
        self._stopped.set()
        self._pool.shutdown(wait=wait, cancel_futures=True)
        self._landed.put(None)

    def _start(self, task: Callable[..., Any], *arguments: Any) -> Future[Any]:
        with self._lock:
            self._pending += 1
        try:
            return self._pool.submit(self._run, task, *arguments)
        except RuntimeError:
            if self._stopped.is_set():  # closed meanwhile, and the pool takes no more
                raise CancelledError from None
            raise

    def _run(self, task: Callable[..., Any], *arguments: Any) -> Any:
        if self._stopped.is_set():
            raise CancelledError
        try:
            result = task(*arguments)
        except CancelledError:
            raise
        except (MemoryError, OSError) as error:  # mmap says "Cannot allocate memory" as an OSError
            lacking = self._no_memory(error)
            self._fail(lacking)
            raise lacking from error
        except BaseException as error:
            self._fail(error)
            raise
        self._task_done()
        return result

    def _task_done(self) -> None:
        with self._lock:
            self._pending -= 1
            if self._pending or self._error:
                return
        self.seconds = time.monotonic() - self.started
        self._pool.shutdown(wait=False)
        self._landed.put(None)

    def _fail(self, error: BaseException) -> None:
        """Note the first error, unless somebody has stopped the reading before, and stop everything."""
        with self._lock:
            if self._error is None and not self._stopped.is_set():
                self._error = error
        self._stopped.set()
        self._landed.put(None)

    def _no_memory(self, error: MemoryError | OSError) -> WeightsError:
        return WeightsError(
            f"not enough memory for {self._bucket.url(self.snapshot.model_path)}, {self.total_bytes / 1e9:.2f} GB "
            f"({error}). Give the machine or the container more"
        )

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error
        if self.seconds is None:
            raise WeightsError(
                f"reading {self._bucket.url(self.snapshot.model_path)} was stopped before its end"
            )

    def _read_chunk(self, chunk: Chunk, into: list[memoryview]) -> None:
        self._reader.read(chunk, into)
        with self._lock:
            self.bytes_read += chunk.length

    def _read_whole(self, file: SnapshotFile) -> bytes:
        data = bytearray(file.size)
        for chunk in file.chunks():
            self._read_chunk(chunk, [memoryview(data)[chunk.start : chunk.start + chunk.length]])
        return bytes(data)

    def _read_head(self, file: SnapshotFile) -> None:
        """Read the chunks that hold the header, hand out memory for every tensor, and queue the other chunks."""
        where = self._bucket.url(file.key)
        head = bytearray()
        needed = LENGTH_BYTES
        chunks = list(file.chunks())
        while chunks and len(head) < needed:
            chunk = chunks.pop(0)
            data = bytearray(chunk.length)
            self._read_chunk(chunk, [memoryview(data)])
            head += data
            needed = header_length(bytes(head[:LENGTH_BYTES]), where, file.size)
        if not head:
            header_length(b"", where, file.size)  # an empty file: raises
        places = parse_header(memoryview(head)[:needed], where, file.size)
        arriving = [_ArrivingTensor(place) for place in places]
        # The tensors' bytes that came with the header are copied; all others are read where they stay.
        for tensor in arriving:
            part = tensor.overlap(needed, len(head))
            part[:] = memoryview(head)[tensor.place.start : tensor.place.start + len(part)]
            self._part_arrived(file, tensor, len(part))
        unfinished = [tensor for tensor in arriving if tensor.missing]
        ends = [tensor.place.end for tensor in unfinished]
        for chunk in chunks:
            first = bisect.bisect_right(ends, chunk.start)
            last = bisect.bisect_left(ends, chunk.start + chunk.length)
            self._start(self._read_tensors, chunk, unfinished[first : last + 1])

    def _read_tensors(self, chunk: Chunk, tensors: list[_ArrivingTensor]) -> None:
        parts = [tensor.overlap(chunk.start, chunk.start + chunk.length) for tensor in tensors]
        self._read_chunk(chunk, parts)
        for tensor, part in zip(tensors, parts, strict=True):
            self._part_arrived(chunk.file, tensor, len(part))

    def _part_arrived(self, file: SnapshotFile, tensor: _ArrivingTensor, count: int) -> None:
        with self._lock:
            tensor.missing -= count
            landed = tensor.missing == 0
        if landed:
            place = tensor.place
            data = tensor.hand_over()
            self._landed.put(LandedTensor(file.path, place.name, place.dtype, place.shape, data))


class _ArrivingTensor:
    """A tensor's memory while its chunks arrive."""

    def __init__(self, place: TensorPlace) -> None:
        self.place = place
        self.missing = place.end - place.start
        # A private mapping goes back to the system the moment the tensor is freed, and is touched first by the
        # thread that reads into it, not here.
        self._memory: Any = (
            mmap.mmap(-1, self.missing, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            if self.missing >= MAPPED_FROM
            else bytearray(self.missing)
        )

    def overlap(self, start: int, end: int) -> memoryview:
        """The part of this tensor's memory that holds the file's bytes [start, end)."""
        first = max(start, self.place.start) - self.place.start
        last = min(end, self.place.end) - self.place.start
        return memoryview(self._memory)[first : max(first, last)]

    def hand_over(self) -> Any:
        """Give the memory away; this object keeps none of it."""
        memory, self._memory = self._memory, None
        return memory
