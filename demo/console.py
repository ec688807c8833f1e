"""What the demo prints: one line per stage with its time, and beneath it what the stage has to show."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

_TITLE_WIDTH = 62


class Console:
    def __init__(self) -> None:
        self._started = time.monotonic()
        self._notes: list[str] = []

    @contextmanager
    def stage(self, title: str) -> Iterator[None]:
        """Print the title at once, its time when the block is done, then the notes taken in it."""
        began = time.monotonic()
        print(f"{title} ".ljust(_TITLE_WIDTH, "."), end=" ", flush=True)
        try:
            yield
        except BaseException as error:
            how = "failed" if isinstance(error, Exception) else "stopped"
            print(f"{time.monotonic() - began:6.1f} s   {how}", flush=True)
            self._notes.clear()
            raise
        print(f"{time.monotonic() - began:6.1f} s", flush=True)
        for note in self._notes:
            print(f"    {note}".rstrip(), flush=True)
        self._notes.clear()

    def note(self, text: str) -> None:
        """Show these lines beneath the running stage's, once it is done."""
        self._notes += text.splitlines()

    def say(self, text: str) -> None:
        print(text, flush=True)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._started
