"""One display over all stages of a run, on a terminal or off it, and the way to stop a running stage.

Knows nothing of what the bytes are. Every worker thread reports through `Stage.advance`, which is therefore also
where an interrupted preparation stops them.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NoReturn, TextIO

from preparation.lines import LineDisplay
from preparation.stages import Clock, Overview, Stage, Upcoming
from preparation.terminal import TerminalDisplay

# What has begun when the person interrupts gets this long to end.
_PATIENCE_SECONDS = 20.0
_SILENCE_SECONDS = 2.0
# Long enough not to fill a log, and short enough for CI not to take a run for dead.
_LOG_SECONDS = 30.0
INTERRUPTED = "Interrupted. Run the same command again: finished files are kept."


def end_interrupted() -> NoReturn:
    """Say so and end the process at once: an orderly end would wait for every thread, stalled ones too."""
    for stream, text in ((sys.stdout, ""), (sys.stderr, f"\n{INTERRUPTED}\n")):
        if _takes_bytes(stream):
            stream.write(text)
            stream.flush()
    os._exit(130)


def _takes_bytes(stream: TextIO) -> bool:
    """Whether writing would not wait for good, as on a terminal that somebody has stopped."""
    try:
        return bool(select.select([], [stream.fileno()], [], 1.0)[1])
    except (OSError, ValueError):  # no file at all
        return True


class Progress:
    """Where the stages of a run report. Where there is no terminal, a long stage is heard of every `log_seconds`."""

    def __init__(
        self,
        stream: TextIO | None = None,
        *,
        clock: Clock = time.monotonic,
        log_seconds: float = _LOG_SECONDS,
    ) -> None:
        self._clock = clock
        self._cancelled = threading.Event()
        self._overview = Overview(clock)
        self._lock = threading.RLock()
        self._blocks = 0  # that need the display now
        self._ended = 0  # stages
        self._display = _display(stream or sys.stderr, self._overview, log_seconds)

    def say(self, line: str) -> None:
        """Write one line, without breaking what is drawn."""
        self._display.say(line)

    @contextmanager
    def over(
        self, stages: Iterable[Upcoming], later: Iterable[Sequence[Upcoming]] = ()
    ) -> Iterator[None]:
        """Show the body's stages as one whole: these are to come, and `later` ones of other models after it.

        Nothing but `say` may write to the terminal meanwhile.
        """
        models = tuple(later)
        with self._lock:
            self._overview.expect(stages, models)
            self._ended = 0
        whole = False
        self._open()
        try:
            yield
            whole = not models and self._ended > 1
        finally:
            with self._lock:
                self._overview.expect(())
            self._close(whole=whole)

    @contextmanager
    def stage(self, name: str, total: int) -> Iterator[Stage]:
        """Show a stage of `total` bytes while the body runs. A stage with nothing to do is not mentioned."""
        stage = Stage(name, total, self._clock, self._cancelled)
        if total == 0:
            with self._lock:
                self._overview.pass_by(name)
            yield stage
            return
        finished = False
        with self._lock:
            self._overview.begin(stage)
        self._open()
        try:
            self._display.draw()
            yield stage
            finished = True
        finally:
            with self._lock:
                self._overview.end(stage, finished=finished)
                self._ended += finished
            self._display.ended(stage, finished=finished)
            self._close()

    def _open(self) -> None:
        with self._lock:
            self._blocks += 1
            if self._blocks == 1:
                self._display.open()

    def _close(self, *, whole: bool = False) -> None:
        with self._lock:
            self._blocks -= 1
            if self._blocks == 0:
                self._display.close(whole=whole)

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

        def give_up() -> None:
            self._display.abandon()
            end_interrupted()

        def stop(_signal: int, _frame: object) -> None:
            if self._cancelled.is_set():
                self._display.abandon()
                os._exit(130)
            self._cancelled.set()
            after(_SILENCE_SECONDS, lambda: self.say("\nStopping. Ctrl-C again ends at once."))
            after(patience, give_up)
            raise KeyboardInterrupt

        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for timer in timers:
                timer.cancel()
            for number, handler in before.items():
                signal.signal(number, handler)


def _display(
    stream: TextIO, overview: Overview, log_seconds: float
) -> TerminalDisplay | LineDisplay:
    if stream.isatty():
        terminal = TerminalDisplay(stream, overview)
        if not terminal.is_dumb:
            return terminal
    return LineDisplay(stream, overview, log_seconds)
