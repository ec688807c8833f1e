"""Doing something every so often, on a thread of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Ticker:
    """Calls `act` every `seconds` between `start` and `stop`; a call that has begun is not waited for."""

    def __init__(self, seconds: float, act: Callable[[], None]) -> None:
        self._seconds = seconds
        self._act = act
        self._stopped = threading.Event()

    def start(self) -> None:
        self._stopped = stopped = threading.Event()

        def tick() -> None:
            while not stopped.wait(self._seconds):
                self._act()

        threading.Thread(target=tick, name="progress", daemon=True).start()

    def stop(self) -> None:
        self._stopped.set()
