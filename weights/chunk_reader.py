"""Chunks of several files read at once into memory of their own, verified, and handed on one by one."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from functools import partial

from weights.chunks import CHUNK_SIZE, Chunk
from weights.counters import Counters
from weights.flight import Flight, Route
from weights.objects import ObjectReader
from weights.parallel import run_all


class ChunkReader:
    """Reads chunks by `connections` threads. After the first failure none is begun, and no try waited for."""

    def __init__(self, reader: ObjectReader, connections: int) -> None:
        self.stopped = threading.Event()
        self._memory = _OwnMemory()
        self._route = Route(lambda: reader, self._memory, Counters())
        self._connections = connections
        self._flights: set[Flight] = set()
        self._lock = threading.Lock()

    def each(self, chunks: Iterable[Chunk], task: Callable[[Chunk], None]) -> None:
        """Run `task` for every chunk; raises what the first failing one raised."""
        run_all(
            [partial(task, chunk) for chunk in chunks],
            self._connections,
            name="weights",
            on_failure=self._stop,
        )

    def read(self, chunk: Chunk) -> memoryview:
        """The chunk's verified bytes, in memory that this thread's next chunk takes."""
        flight = Flight(self._route, [chunk])
        with self._lock:
            self._flights.add(flight)
            if self.stopped.is_set():
                flight.abort()
        try:
            flight.run()
        finally:
            with self._lock:
                self._flights.remove(flight)
        return self._memory.of(chunk)

    def _stop(self) -> None:
        """No chunk is tried again, and nobody waits for one."""
        self.stopped.set()
        with self._lock:
            flights = list(self._flights)
        for flight in flights:
            flight.abort()


class _OwnMemory:
    """A sink of one chunk a thread."""

    def __init__(self) -> None:
        self._own = threading.local()

    def of(self, chunk: Chunk) -> memoryview:
        if not hasattr(self._own, "chunk"):
            self._own.chunk = memoryview(bytearray(CHUNK_SIZE))
        data: memoryview = self._own.chunk[: chunk.length]
        return data

    def room(self, chunk: Chunk, offset: int) -> memoryview:
        return self.of(chunk)[offset:]

    def filled(self, chunk: Chunk, offset: int, count: int) -> None:
        """Nothing to do: the bytes are where they belong."""

    def landed(self, chunk: Chunk) -> None:
        """Nothing to do: whoever asked for the chunk takes it from here."""

    def leave(self) -> None:
        """Nothing to do: a thread's memory goes with it."""
