"""Standard error while something is drawn on it: what others write there goes above the drawing, in whole lines."""

from __future__ import annotations

import io
import logging
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TextIO, cast


class Diverted(io.TextIOBase):
    """Stands in for `stream`, which is `sys.stderr`, until `end`; lines written meanwhile are handed to `say`.

    The handlers of logging, which took hold of standard error when they were made, are given this for as long.
    """

    def __init__(self, stream: TextIO, say: Callable[[str], None]) -> None:
        self._stream = stream
        self._say = say
        self._pending = ""
        self._lock = threading.RLock()
        for handler in _handlers():
            if handler.stream is stream:
                handler.setStream(self)
        sys.stderr = cast("TextIO", self)

    def end(self) -> None:
        """Put everything back, and write what was not a whole line yet."""
        for handler in _handlers():
            if handler.stream is self:
                handler.stream = self._stream  # `setStream` would wait for a thread that is writing
        sys.stderr = self._stream
        pending, self._pending = self._pending, ""
        with suppress(OSError):
            self._stream.write(pending)

    def write(self, text: str) -> int:
        with self._lock:
            *lines, self._pending = (self._pending + text).split("\n")
        # Without the lock: a thread that draws holds the display's, and may have to write here.
        for line in lines:
            self._say(line.rpartition("\r")[2])  # of a bar that somebody draws, how it ended
        return len(text)

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._stream.fileno()

    def isatty(self) -> bool:
        return self._stream.isatty()


def _handlers() -> list[logging.StreamHandler[Any]]:
    root = logging.getLogger()
    return [
        handler
        for logger in (root, *root.manager.loggerDict.values())
        if isinstance(logger, logging.Logger)
        for handler in logger.handlers
        if isinstance(handler, logging.StreamHandler)
    ]
