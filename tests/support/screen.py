"""What a person sees: a terminal of which a test holds the other end, and the screen that its output makes.

It stands in for a terminal emulator and knows only what the programs here may send to one: text, line ends, colours,
the cursor's way up, and wiping a line. Anything else fails the test. Made narrower it wraps the lines it shows, as
nearly all terminals do, or cuts them off, as xterm does.
"""

from __future__ import annotations

import codecs
import fcntl
import os
import re
import struct
import termios
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Self, TextIO

_TOKEN = re.compile(r"\x1b\[([\d;?]*)([A-Za-z])|\x1b\](.*?)\x07|[\r\n]|[^\x1b\r\n]")
_PATIENCE_SECONDS = 30


@dataclass
class _Row:
    text: str = ""
    goes_on: bool = False  # in the next row, for lack of room


@dataclass
class Screen:
    """Rows from the first one written; the last `height` of them can be reached by the cursor."""

    width: int
    height: int
    rows: list[_Row] = field(default_factory=lambda: [_Row()])
    row: int = 0
    column: int = 0
    colours: set[str] = field(default_factory=set)
    marks: list[str] = field(default_factory=list)
    _rest: str = ""

    @property
    def lines(self) -> list[str]:
        """What stands in each row, from the first one to the last that is not empty."""
        found = [row.text.rstrip() for row in self.rows]
        while found and not found[-1]:
            found.pop()
        return found

    def feed(self, text: str) -> None:
        text = self._rest + text
        position = 0
        while match := _TOKEN.match(text, position):
            position = match.end()
            self._take(match)
        self._rest = text[position:]  # the beginning of a sequence
        if len(self._rest) > 40:
            raise AssertionError(f"no terminal sequence known here: {self._rest!r}")

    def _take(self, match: re.Match[str]) -> None:
        numbers, command, mark = match.groups()
        if mark is not None:
            self.marks.append(mark)
        elif command == "m":
            self.colours.update(numbers.split(";"))
        elif command == "A":
            top = max(0, len(self.rows) - self.height)
            self.row = max(top, self.row - int(numbers or 1))
        elif command == "K" and numbers == "2":
            self.rows[self.row] = _Row()
        elif command:
            raise AssertionError(f"an unexpected terminal sequence: {match[0]!r}")
        elif match[0] == "\r":
            self.column = 0
        elif match[0] == "\n":
            self._down(goes_on=False)
        else:
            self._put(match[0])

    def _put(self, character: str) -> None:
        if self.column == self.width:
            self._down(goes_on=True)
            self.column = 0
        row = self.rows[self.row]
        row.text = (
            f"{row.text[: self.column]:<{self.column}}{character}{row.text[self.column + 1 :]}"
        )
        self.column += 1

    def _down(self, *, goes_on: bool) -> None:
        self.rows[self.row].goes_on = goes_on
        self.row += 1
        if self.row == len(self.rows):
            self.rows.append(_Row())

    def resize(self, width: int, height: int, *, wraps: bool = True) -> None:
        self.height = height
        if not wraps:
            self.width = width
            for row in self.rows:
                row.text = row.text[:width]
            return
        rows: list[_Row] = []
        text = ""
        for number, row in enumerate(self.rows):
            text += row.text
            if number == self.row:
                cursor = len(text) - len(row.text) + self.column
                here = (
                    len(rows) + max(0, cursor - 1) // width,
                    cursor - max(0, cursor - 1) // width * width,
                )
            if not row.goes_on:
                pieces = [text[start : start + width] for start in range(0, len(text), width)] or [
                    ""
                ]
                rows += [_Row(piece, goes_on=True) for piece in pieces]
                rows[-1].goes_on = False
                text = ""
        self.width, self.rows, (self.row, self.column) = width, rows, here


class PseudoTerminal:
    """A real terminal device: `stream` is what a program writes to, `screen` what has become of it."""

    def __init__(self, width: int, height: int = 24, *, knows_its_size: bool = True) -> None:
        self.screen = Screen(width, height)
        self.written = ""
        self._master, self._slave = os.openpty()
        self._changed = threading.Condition()
        if knows_its_size:
            self._tell_size()
        self.stream: TextIO = os.fdopen(os.dup(self._slave), "w", encoding="utf-8")
        self._reader = threading.Thread(target=self._read)
        self._failure: BaseException | None = None

    def __enter__(self) -> Self:
        self._reader.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self.hang_up()
        self._reader.join()
        os.close(self._master)

    @property
    def device(self) -> int:
        """The descriptor to give a child as its standard error."""
        return self._slave

    def hang_up(self) -> None:
        """Close this process's own ends, so that the terminal ends with the last program on it."""
        if self._slave >= 0:
            self.stream.close()
            os.close(self._slave)
            self._slave = -1

    def wait_for(self, seen: Callable[[Screen], bool]) -> list[str]:
        """The lines of the screen, once it is as described."""
        with self._changed:
            found = self._changed.wait_for(
                lambda: self._failure or seen(self.screen), _PATIENCE_SECONDS
            )
            if self._failure:
                raise self._failure
            assert found, "\n".join(["the screen never came to be so:", *self.screen.lines])
            return self.screen.lines

    def settle(self) -> list[str]:
        """The lines of the screen, once all that was written so far has reached it."""
        mark = f"mark {len(self.screen.marks)}"
        self.stream.write(f"\x1b]{mark}\x07")
        self.stream.flush()
        return self.wait_for(lambda screen: mark in screen.marks)

    def resize(self, width: int, height: int = 24, *, wraps: bool = True) -> None:
        """To be called while nothing is written."""
        self.settle()
        with self._changed:
            self.screen.resize(width, height, wraps=wraps)
            self._tell_size()

    def _tell_size(self) -> None:
        size = struct.pack("HHHH", self.screen.height, self.screen.width, 0, 0)
        fcntl.ioctl(self._master, termios.TIOCSWINSZ, size)

    def _read(self) -> None:
        decode = codecs.getincrementaldecoder("utf-8")().decode
        while True:
            try:
                data = os.read(self._master, 65536)
            except OSError:  # nobody has the other end any more
                return
            with self._changed:
                text = decode(data)
                self.written += text
                try:
                    self.screen.feed(text)
                except BaseException as error:  # noqa: BLE001 - raised where the test waits
                    self._failure = error
                self._changed.notify_all()
                if not data or self._failure:
                    return
