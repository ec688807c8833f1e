"""One live bar per stage on a terminal, one line per stage anywhere else, and the way to stop a running stage.

Knows nothing of what the bytes are. Every worker thread reports through `Stage.advance`, which is therefore also
where an interrupted preparation stops them.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn, TextIO

from tqdm import tqdm

from preparation.errors import CancelledStageError

# What has begun when the person interrupts gets this long to end.
_PATIENCE_SECONDS = 20.0
_SILENCE_SECONDS = 2.0
INTERRUPTED = "Interrupted. Run the same command again: finished files are kept."


def human_size(size: float) -> str:
    """Decimal units, as the Hub shows them: 5135149760 is "5.14 GB"."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:.3g} {unit}"
    return f"{int(size)} B"


def _size_instead(stream: TextIO) -> tuple[int, int] | tuple[None, None]:
    """Columns and rows to assume for a terminal that does not know its own, as in `docker run -t` and CI."""
    try:
        known = os.get_terminal_size(stream.fileno()).columns
    except (OSError, ValueError):  # no terminal, or no file at all
        return None, None
    return (None, None) if known else shutil.get_terminal_size()


def end_interrupted() -> NoReturn:
    """Say so and end the process at once: an orderly end would wait for every thread, stalled ones too."""
    sys.stderr.write(f"\n{INTERRUPTED}\n")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(130)


class Stage:
    """A running stage; `advance` may be called from any thread."""

    def __init__(self, bar: tqdm[Any], cancelled: threading.Event) -> None:
        self._bar = bar
        self._cancelled = cancelled
        self._lock = threading.Lock()
        self.done = 0

    def advance(self, size: int) -> None:
        """Count bytes; negative when a transfer had to start again.

        Raises:
            CancelledStageError: the preparation was interrupted, so the calling thread should end.
        """
        if self._cancelled.is_set():
            raise CancelledStageError("interrupted")
        with self._lock:
            self.done += size
            self._bar.update(size)


class Progress:
    """Where the stages of one preparation report."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._cancelled = threading.Event()

    def say(self, line: str) -> None:
        """Write one line, without breaking a bar."""
        tqdm.write(line, file=self._stream)

    @contextmanager
    def stage(self, name: str, total: int) -> Iterator[Stage]:
        """Show a stage of `total` bytes while the body runs. A stage with nothing to do is not mentioned."""
        terminal = self._stream.isatty()
        began = time.monotonic()
        columns, rows = _size_instead(self._stream)
        with tqdm(
            total=total,
            desc=name,
            unit="B",
            unit_scale=True,
            dynamic_ncols=columns is None,
            ncols=columns,
            nrows=rows,
            file=self._stream,
            disable=not terminal or total == 0,
        ) as bar:
            stage = Stage(bar, self._cancelled)
            yield stage
        if not terminal and total:
            self.say(f"{name}: {human_size(stage.done)} in {time.monotonic() - began:.1f} s")

    @contextmanager
    def stopping_on_signals(self, patience: float = _PATIENCE_SECONDS) -> Iterator[None]:
        """Ctrl-C and SIGTERM raise KeyboardInterrupt here and end the worker threads; a second one ends at once.

        Without this the pools of the libraries below would first finish the files they had begun, gigabytes later.
        Threads end when they hear of bytes, which in a stalled connection they never do: so the process ends anyway
        when what is below has not let go after `patience` seconds.
        """
        timers: list[threading.Timer] = []

        def after(seconds: float, act: Callable[[], None]) -> None:
            timer = threading.Timer(seconds, act)
            timer.daemon = True
            timer.start()
            timers.append(timer)

        def stop(_signal: int, _frame: object) -> None:
            if self._cancelled.is_set():
                os._exit(130)
            self._cancelled.set()
            after(_SILENCE_SECONDS, lambda: self.say("\nStopping. Ctrl-C again ends at once."))
            after(patience, end_interrupted)
            raise KeyboardInterrupt

        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for timer in timers:
                timer.cancel()
            for number, handler in before.items():
                signal.signal(number, handler)
