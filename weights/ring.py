"""A piece of memory that two processes share, cut into slots: one reads bytes into them, the other takes them out.

So bytes cross from the reading process without a copy through a pipe, and memory stays bounded by the ring, not by
the model. On a card's machine the ring is also what is pinned.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import queue
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass

from weights.chunks import Chunk

SLOT_BYTES = 4 * 1024 * 1024
LEAST_SLOTS = 4


class RingClosedError(Exception):
    """Nobody takes anything out any more."""


class Ring:
    """Shared memory of `slots` slots; `descriptor` is how the other process gets at it."""

    def __init__(self, descriptor: int, slots: int) -> None:
        self.descriptor = descriptor
        self.slots = slots
        self.memory = mmap.mmap(descriptor, slots * SLOT_BYTES)

    @staticmethod
    def of_size(size: int) -> Ring:
        """A new ring of about `size` bytes, and at least a few slots."""
        slots = max(LEAST_SLOTS, size // SLOT_BYTES)
        descriptor = _anonymous_file()
        os.ftruncate(descriptor, slots * SLOT_BYTES)
        return Ring(descriptor, slots)

    def slot(self, number: int) -> memoryview:
        return memoryview(self.memory)[number * SLOT_BYTES : (number + 1) * SLOT_BYTES]

    def close(self) -> None:
        os.close(self.descriptor)
        with contextlib.suppress(BufferError):  # a view of it is still in use; it goes with that
            self.memory.close()


def _anonymous_file() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("weights-ring")
    descriptor, name = tempfile.mkstemp(prefix="weights-ring.")
    os.unlink(name)  # noqa: PTH108 - a descriptor's name, gone before anybody sees it
    return descriptor


@dataclass
class _Held:
    """A slot that one thread is filling with bytes of one chunk, from `start` on."""

    slot: int
    chunk: Chunk
    start: int
    used: int = 0


class RingSink:
    """The reading side: a sink that fills slots and says so.

    `on_piece` is told of each filled slot (chunk, offset in the chunk, slot, bytes), `on_landed` of each verified
    chunk, after all its pieces. `free` gives a slot back.
    """

    def __init__(
        self,
        ring: Ring,
        on_piece: Callable[[Chunk, int, int, int], None],
        on_landed: Callable[[Chunk], None],
    ) -> None:
        self._ring = ring
        self._on_piece = on_piece
        self._on_landed = on_landed
        # The last one freed comes first: the processor's cache still has it, and the others are perhaps never touched.
        self._slots: queue.LifoQueue[int | None] = queue.LifoQueue()
        self._own = threading.local()
        for slot in reversed(range(ring.slots)):
            self._slots.put(slot)

    def free(self, slot: int) -> None:
        self._slots.put(slot)

    def close(self) -> None:
        """Wake whoever waits for a slot, with a RingClosedError."""
        self._slots.put(None)

    def room(self, chunk: Chunk, offset: int) -> memoryview:
        held: _Held | None = getattr(self._own, "held", None)
        if held is None:
            slot = self._slots.get()
            if slot is None:
                self._slots.put(None)
                raise RingClosedError
            held = self._own.held = _Held(slot, chunk, offset)
        elif held.chunk is not chunk or held.start + held.used != offset:
            # Begun for a chunk that was started again, or that another thread has read: never to be sent.
            held = self._own.held = _Held(held.slot, chunk, offset)
        left = min(SLOT_BYTES - held.used, chunk.length - offset)
        return self._ring.slot(held.slot)[held.used : held.used + left]

    def filled(self, chunk: Chunk, offset: int, count: int) -> None:
        held: _Held = self._own.held
        held.used += count
        if held.used == SLOT_BYTES or offset + count == chunk.length:
            self._own.held = None
            self._on_piece(chunk, held.start, held.slot, held.used)

    def landed(self, chunk: Chunk) -> None:
        self._on_landed(chunk)

    def leave(self) -> None:
        held: _Held | None = getattr(self._own, "held", None)
        if held is not None:
            self._own.held = None
            self._slots.put(held.slot)
