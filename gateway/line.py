"""The line before the slots of Cog's server: first come, first served, and no longer than allowed."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

# Of the durations that are averaged, how much the newest counts.
_NEWEST = 0.2
_SHORTEST_ADVICE_S = 1.0
_LONGEST_ADVICE_S = 60.0


class LineFullError(Exception):
    """As many wait as may."""


class Place:
    """One in the line, from before its id is claimed until it is done or gives up."""

    def __init__(self) -> None:
        self.turn = asyncio.Event()


class Line:
    """Hands out `slots` slots. A place is taken at once or not at all; its turn is then waited for.

    For one event loop. Not a semaphore, since those who wait are counted and the slots' use is timed.
    """

    def __init__(self, slots: int, size: int) -> None:
        self.slots = slots
        self.size = size
        self._free = slots
        self._waiting: deque[Place] = deque()
        self._usual_s = 1.0

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def running(self) -> int:
        return self.slots - self._free

    @property
    def is_full(self) -> bool:
        return not self._free and len(self._waiting) >= self.size

    @property
    def advice_s(self) -> float:
        """After how many seconds it may be worth asking again, by how long the last ones took."""
        wait = self._usual_s * (1 + self.waiting / self.slots)
        return min(max(wait, _SHORTEST_ADVICE_S), _LONGEST_ADVICE_S)

    def join(self) -> Place:
        """Raises LineFullError."""
        place = Place()
        if self._free:
            self._give(place)
        elif len(self._waiting) >= self.size:
            raise LineFullError
        else:
            self._waiting.append(place)
        return place

    def leave(self, place: Place) -> None:
        """Give up the place or the slot; to be called once for each that joined."""
        if place.turn.is_set():
            self._free += 1
            self._next()
        else:
            self._waiting.remove(place)

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Around what is done with a slot: those who are turned away are advised by it."""
        now = asyncio.get_running_loop().time
        started = now()
        yield
        self._usual_s += _NEWEST * (now() - started - self._usual_s)

    def _give(self, place: Place) -> None:
        self._free -= 1
        place.turn.set()

    def _next(self) -> None:
        while self._free and self._waiting:
            self._give(self._waiting.popleft())
