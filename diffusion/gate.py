"""Who may use the model: any number of requests at a time, or the one that replaces it. Knows neither of them."""

import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager
from queue import Empty, SimpleQueue

from diffusion.errors import BusyError
from diffusion.turns import Turns

# An iterator dropped in a reference cycle leaves only when garbage is collected, and with nobody let in, nothing else
# may come to do that. With torch loaded it takes some 0.3 s, so it is not done at once.
COLLECT_EVERY = 5.0  # seconds


class Gate:
    """Shared by many or held by one alone, first come, first served: neither kind can keep the other out for ever.

    A thread inside must not ask for the gate again: whoever wants it alone may have come in between, and waits for
    that thread.
    """

    def __init__(self) -> None:
        # Everybody comes in through here, one by one. Who wants the gate alone stays in it until all others have left.
        self._entrance = Turns()
        self._inside = 0  # as far as counted; whoever is in the entrance counts
        # An iterator that is dropped leaves while garbage is collected, on any thread and amid any of its work, so
        # leaving must not take a lock that this thread may hold. `SimpleQueue.put` is made to be called from there.
        self._left: SimpleQueue[None] = SimpleQueue()
        self._closed = False

    @property
    def closed(self) -> bool:
        """Whether somebody has the gate alone, or waits for those inside to leave."""
        return self._closed

    @property
    def waiting(self) -> int:
        """How many are in front of the gate, asking to come in."""
        return self._entrance.waiting

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Be inside together with others who share."""
        with self._entrance:
            while not self._left.empty():
                self._left.get()
                self._inside -= 1
            self._inside += 1
        try:
            yield
        finally:
            self._left.put(None)

    @contextmanager
    def exclusive(self, patience: float) -> Iterator[None]:
        """Be inside alone. Those who come later wait from now on.

        Raises `BusyError`, and lets them in, when those inside have not left after `patience` seconds.
        """
        with self._entrance:
            deadline = time.monotonic() + patience
            self._closed = True
            try:
                while self._inside:
                    self._await_one(deadline)
                yield
            finally:
                self._closed = False

    def _await_one(self, deadline: float) -> None:
        remaining = deadline - time.monotonic()
        try:
            self._left.get(timeout=max(0.0, min(remaining, COLLECT_EVERY)))
        except Empty:
            if remaining <= 0:
                raise BusyError(
                    f"{self._inside} request(s) under way kept the model for too long for it to be replaced. "
                    "It goes on serving; try again when there is less to do."
                ) from None
            gc.collect()
        else:
            self._inside -= 1
