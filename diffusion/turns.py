"""One generation at a time on the device, first come, first served."""

from collections import deque
from threading import Lock
from types import TracebackType


class Turns:
    """A lock that is handed over in the order it was asked for.

    `threading.Lock` makes no such promise: a thread that releases it and asks again at once, as a request for several
    images does, usually wins over those already waiting.
    """

    def __init__(self) -> None:
        self._guard = Lock()
        self._taken = False
        self._waiting: deque[Lock] = deque()

    @property
    def waiting(self) -> int:
        """How many are in the queue."""
        return len(self._waiting)

    def __enter__(self) -> None:
        turn = Lock()
        with self._guard:
            if not self._taken:
                self._taken = True
                return
            turn.acquire()
            self._waiting.append(turn)
        turn.acquire()  # until whoever leaves hands over; `_taken` stays true throughout

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with self._guard:
            if self._waiting:
                self._waiting.popleft().release()
            else:
                self._taken = False
