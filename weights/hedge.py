"""A second request for a chunk that a flight waits for too long, in case only its connection is slow."""

from __future__ import annotations

from blake3 import blake3

from weights.chunks import Chunk
from weights.errors import WeightsError
from weights.flight import HASH_STEP, Flight, Route
from weights.transport import TransportError


class Hedge:
    """A second try at the chunk a flight is stuck with, into memory of its own: the first to be right wins."""

    def __init__(self, route: Route, flight: Flight) -> None:
        flight.hedged = True
        self.landed: list[Chunk] = []
        self._route = route
        self._flight = flight
        self._own: Flight | None = None
        self._ended = False

    def run(self) -> None:
        flight = self._flight
        with flight.lock:
            if not flight.chunks:
                return
            chunk = flight.chunks[0]
        self._route.counters.add(hedges=1, requests=1)
        data = memoryview(bytearray(chunk.length))
        if not self._read(chunk, data):
            return  # and no other: where a second try fails too, it is the server
        with flight.lock:
            if flight.chunks[:1] != [chunk] or flight.over.is_set():
                return  # it was not stuck after all
            flight.chunks.remove(chunk)
            flight.abort()
        flight.over.wait()  # only now does nobody else write to the chunk's memory
        sink, offset = self._route.sink, 0
        while offset < chunk.length:
            room = sink.room(chunk, offset)
            count = min(len(room), chunk.length - offset)
            room[:count] = data[offset : offset + count]
            sink.filled(chunk, offset, count)
            offset += count
        sink.landed(chunk)
        self._route.counters.add(hedges_won=1, landed_bytes=chunk.length)
        cached = self._route.cached(chunk.file)
        if cached is not None:  # the claim was left to us
            cached.write_at(chunk.index, 0, data)
            cached.complete(chunk.index)
        self.landed.append(chunk)

    def abort(self) -> None:
        self._ended = True
        if self._own is not None:
            self._own.abort()

    def _read(self, chunk: Chunk, data: memoryview) -> bool:
        """One attempt; whether the right bytes came."""
        file, route = chunk.file, self._route
        own = self._own = Flight(route, [chunk])
        if self._ended:
            own.abort()
        hasher = blake3()
        filled = 0
        try:
            with route.reader.open_range(
                file.key,
                chunk.start,
                chunk.end,
                size=file.size,
                etag=route.expected_etag(file),
                on_connection=own.attach,  # its own flight, only to be aborted through
            ) as answer:
                if answer.start != chunk.start:
                    return False
                while filled < chunk.length and not self._flight.over.is_set():
                    count = answer.read(data[filled : filled + HASH_STEP])
                    hasher.update(data[filled : filled + count])
                    filled += count
                    route.counters.add(network_bytes=count)
        except (TransportError, WeightsError):
            return False
        if filled < chunk.length or self._ended:
            return False
        return not route.verify or chunk.digest is None or hasher.hexdigest() == chunk.digest
