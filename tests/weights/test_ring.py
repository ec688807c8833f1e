"""The ring hands every slot to one thread at a time, sends only what is whole, and lets nobody wait for ever."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest

from weights.chunks import Chunk, SnapshotFile
from weights.ring import LEAST_SLOTS, SLOT_BYTES, Ring, RingClosedError, RingSink

MIB = 2**20
DEADLINE = 60  # seconds; only ever waited out by a test that fails


@dataclass(frozen=True)
class Piece:
    """What the other process is told of a filled slot."""

    chunk: Chunk
    offset: int
    slot: int
    count: int


class ReadingSide:
    """A sink on a ring of the fewest slots, and what it has said so far."""

    def __init__(self) -> None:
        self.ring = Ring.of_size(0)
        self.pieces: queue.SimpleQueue[Piece] = queue.SimpleQueue()
        self.landed: list[Chunk] = []
        self.sink = RingSink(
            self.ring, lambda *place: self.pieces.put(Piece(*place)), self.landed.append
        )

    def sent(self) -> list[Piece]:
        found = []
        while not self.pieces.empty():
            found.append(self.pieces.get())
        return found

    def content(self, piece: Piece) -> bytes:
        return bytes(self.ring.slot(piece.slot)[: piece.count])

    def fill(self, chunk: Chunk, value: int, *, step: int = MIB, until: int | None = None) -> None:
        """Read the chunk as a flight does, `step` bytes at most at once, all of them `value`."""
        offset, end = 0, chunk.length if until is None else until
        while offset < end:
            room = self.sink.room(chunk, offset)
            count = min(len(room), step, end - offset)
            room[:count] = bytes([value]) * count
            self.sink.filled(chunk, offset, count)
            offset += count


@pytest.fixture
def side() -> Iterator[ReadingSide]:
    side = ReadingSide()
    yield side
    side.ring.close()


def chunk_of(size: int, index: int = 0) -> Chunk:
    file = SnapshotFile("unet/model.safetensors", "model/unet/model.safetensors", size, None, None)
    return Chunk(file, index, 0, size)


def test_a_ring_has_the_asked_size_and_never_too_few_slots():
    for size, slots in [(0, LEAST_SLOTS), (100 * SLOT_BYTES, 100), (100 * SLOT_BYTES + 1, 100)]:
        ring = Ring.of_size(size)
        assert ring.slots == slots
        assert len(ring.memory) == slots * SLOT_BYTES
        ring.close()


def test_what_one_side_writes_the_other_side_sees(side):
    other = Ring(side.ring.descriptor, side.ring.slots)
    side.fill(chunk_of(3), 7)
    (piece,) = side.sent()
    assert bytes(other.slot(piece.slot)[:3]) == bytes([7, 7, 7])
    other.memory.close()


def test_a_chunk_crosses_in_slots_that_follow_each_other(side):
    chunk = chunk_of(2 * SLOT_BYTES + 5)

    side.fill(chunk, 9)

    pieces = side.sent()
    assert [(piece.offset, piece.count) for piece in pieces] == [
        (0, SLOT_BYTES),
        (SLOT_BYTES, SLOT_BYTES),
        (2 * SLOT_BYTES, 5),
    ]
    assert all(piece.chunk is chunk for piece in pieces)
    assert len({piece.slot for piece in pieces}) == 3


def test_a_landed_chunk_is_told_after_all_its_pieces(side):
    chunk = chunk_of(10)
    side.fill(chunk, 1)
    assert side.landed == []
    side.sink.landed(chunk)
    assert side.landed == [chunk]


def test_a_slot_is_with_one_holder_at_a_time(side):
    threads, rounds = 3 * LEAST_SLOTS, 12
    sizes = [1, SLOT_BYTES - 1, SLOT_BYTES, SLOT_BYTES + 1, 2 * SLOT_BYTES + 333]
    chunks = [
        [chunk_of(sizes[(number + turn) % len(sizes)], index=turn) for turn in range(rounds)]
        for number in range(threads)
    ]
    value_of = {id(chunk): number for number, own in enumerate(chunks) for chunk in own}

    def read(number: int) -> None:
        for chunk in chunks[number]:
            side.fill(chunk, number, step=SLOT_BYTES // 3)
        side.sink.leave()

    expected = sum(chunk.length for own in chunks for chunk in own)
    taken = 0
    with ThreadPoolExecutor(threads) as pool:
        reading = [pool.submit(read, number) for number in range(threads)]
        outstanding: list[Piece] = []
        while taken < expected:
            outstanding.append(side.pieces.get(timeout=DEADLINE))
            assert len({piece.slot for piece in outstanding}) == len(outstanding)
            # As late as can be, so that one who was handed this slot too would have written to it.
            if len(outstanding) == LEAST_SLOTS or taken + outstanding[-1].count >= expected:
                piece = outstanding.pop(0)
            elif side.pieces.empty():
                piece = outstanding.pop()
            else:
                continue
            value = value_of[id(piece.chunk)]
            assert side.content(piece) == bytes([value]) * piece.count
            taken += piece.count
            side.sink.free(piece.slot)
            if taken + sum(piece.count for piece in outstanding) >= expected:
                taken += sum(piece.count for piece in outstanding)
        for done in reading:
            done.result(DEADLINE)


def test_a_slot_begun_for_a_chunk_that_is_started_again_is_not_sent(side):
    chunk = chunk_of(1000)
    side.fill(chunk, 1, until=600)

    side.fill(chunk, 2)

    (piece,) = side.sent()
    assert (piece.offset, piece.count) == (0, 1000)
    assert side.content(piece) == bytes([2]) * 1000


def test_a_slot_begun_for_a_chunk_that_was_given_up_is_not_sent(side):
    given_up, next_one = chunk_of(1000), chunk_of(500, index=1)
    side.fill(given_up, 1, until=600)

    side.fill(next_one, 2)

    (piece,) = side.sent()
    assert piece.chunk is next_one
    assert (piece.offset, piece.count) == (0, 500)
    assert side.content(piece) == bytes([2]) * 500


def test_a_chunk_that_is_started_again_is_sent_again_from_its_first_byte(side):
    chunk = chunk_of(SLOT_BYTES + 10)
    side.fill(chunk, 1, until=SLOT_BYTES + 5)  # one slot is on its way already

    side.fill(chunk, 2)

    pieces = side.sent()
    assert [piece.offset for piece in pieces] == [0, 0, SLOT_BYTES]
    assert [set(side.content(piece)) for piece in pieces] == [{1}, {2}, {2}]


def test_a_thread_that_leaves_gives_back_the_slot_it_had_begun(side):
    def begin_and_leave() -> None:
        side.fill(chunk_of(1000), 1, until=600)
        side.sink.leave()

    for _ in range(LEAST_SLOTS + 1):
        reader = threading.Thread(target=begin_and_leave, daemon=True)
        reader.start()
        reader.join(DEADLINE)
        assert not reader.is_alive(), "no slot is left"
    side.fill(chunk_of(LEAST_SLOTS * SLOT_BYTES), 2)

    pieces = side.sent()
    assert {piece.slot for piece in pieces} == set(range(LEAST_SLOTS))
    assert all(set(side.content(piece)) == {2} for piece in pieces)


def test_who_waits_for_a_slot_goes_on_when_one_is_free_again(side):
    side.fill(chunk_of(LEAST_SLOTS * SLOT_BYTES), 1)
    first, *_ = side.sent()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(side.fill, chunk_of(10, index=1), 2)
        assert not waiting.done()

        side.sink.free(first.slot)

        waiting.result(DEADLINE)
    (piece,) = side.sent()
    assert piece.slot == first.slot


def test_closing_wakes_everybody_who_waits_and_turns_away_who_comes_later(side):
    side.fill(chunk_of(LEAST_SLOTS * SLOT_BYTES), 1)
    waiters = 5
    at_the_door = threading.Barrier(waiters + 1)

    def wait_for_a_slot(index: int) -> None:
        at_the_door.wait(DEADLINE)
        side.sink.room(chunk_of(10, index=index), 0)

    with ThreadPoolExecutor(waiters) as pool:
        waiting = [pool.submit(wait_for_a_slot, index) for index in range(waiters)]
        at_the_door.wait(DEADLINE)

        side.sink.close()

        for waiter in waiting:
            assert isinstance(waiter.exception(DEADLINE), RingClosedError)
    with pytest.raises(RingClosedError):
        side.sink.room(chunk_of(10), 0)
