"""The display where there is no terminal, as in CI and in a file: a line for every stage that has ended, and a sign
of life from one that takes long."""

from __future__ import annotations

import threading
from contextlib import suppress
from typing import TextIO

from preparation.amounts import outcome, standing
from preparation.stages import Overview, Stage
from preparation.ticker import Ticker


class LineDisplay:
    """Safe to use from many threads. Says every `seconds` how far the running stages are."""

    def __init__(self, stream: TextIO, overview: Overview, seconds: float) -> None:
        self._stream = stream
        self._overview = overview
        self._seconds = seconds
        self._lock = threading.Lock()
        self._ticker = Ticker(seconds, self._tell)

    def open(self) -> None:
        self._ticker.start()

    def close(self, *, whole: bool) -> None:  # noqa: ARG002 - the command says itself how it ended
        self._ticker.stop()

    def say(self, text: str) -> None:
        with self._lock, suppress(OSError):  # that nobody reads it is no reason to end the work
            self._stream.write(f"{text}\n")
            self._stream.flush()

    def draw(self) -> None:
        """Nothing is drawn."""

    def ended(self, stage: Stage, *, finished: bool) -> None:
        if finished:
            self.say(f"{stage.name}: {outcome(stage.done, stage.seconds)}")

    def abandon(self) -> None:
        """Nothing is left half-written."""

    def _tell(self) -> None:
        for stage in self._overview.running:
            if stage.seconds >= self._seconds / 2:
                parts = standing(max(0, stage.done), stage.total, stage.rate(), stage.remaining())
                self.say(f"{stage.name}: {', '.join(parts)}")
