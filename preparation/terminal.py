"""The display on a terminal: finished stages go above, what runs and what is to come is drawn over and over below.

Drawing is rich's; where it is drawn is decided here. rich.live hides the cursor, so that a run which is killed or put
to sleep leaves a shell without one, and steps back by the lines it wrote, which in a window made narrower since are
more: pieces of every frame would stay behind.
"""

from __future__ import annotations

import os
import select
import shutil
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import TextIO

from rich.cells import cell_len
from rich.console import Console, RenderableType
from rich.control import Control
from rich.progress_bar import ProgressBar
from rich.segment import ControlType, Segment, Segments
from rich.table import Table
from rich.text import Text

from preparation.amounts import clock, human_size, human_time, outcome, part_of, standing
from preparation.diverted import Diverted
from preparation.stages import Overview, Stage, Upcoming
from preparation.ticker import Ticker

_FRAME_SECONDS = 0.2
_WIDEST = 100  # columns; longer bars are no easier to read
_NAME_WIDTH = 8  # "Download"
_PERCENT_WIDTH = 4
_AMOUNTS_WIDTH = 41  # "5.94 of 6.94 GB, 35.3 MB/s, 1:12:52 left"
_SHORTEST_BAR = 8
_GAP = "  "


class TerminalDisplay:
    """Safe to use from many threads."""

    def __init__(self, stream: TextIO, overview: Overview) -> None:
        # Said outright, since FORCE_COLOR and its like make rich take a file for a terminal and the other way round.
        self._console = Console(file=stream, force_terminal=True)
        self._stream = stream
        self._overview = overview
        self._lock = threading.RLock()
        self._ticker = Ticker(_FRAME_SECONDS, self.draw)
        self._is_open = False
        self._is_gone = False
        self._drawn: list[int] = []  # the width of every line that is drawn now, from the top
        self._diverted: Diverted | None = None
        self._reflows = _reflows(os.environ)

    @property
    def is_dumb(self) -> bool:
        """Whether the terminal cannot move its cursor, or does not say that it can."""
        return self._console.is_dumb_terminal

    def open(self) -> None:
        with self._lock:
            self._is_open = True
            if self._stream is sys.stderr:
                self._diverted = Diverted(self._stream, self.say)
            self._ticker.start()

    def close(self, *, whole: bool) -> None:
        """Take away what is drawn; once the whole run is done, leave the time that it took."""
        with self._lock:
            self._ticker.stop()
            above = []
            if whole:
                text = f"{_named('Total')}{human_time(self._overview.seconds)}"
                above.append(Text(text, no_wrap=True))
            self._is_open = False
            self._write(*above)
            if self._diverted:
                self._diverted.end()
                self._diverted = None

    def say(self, text: str) -> None:
        with self._lock:
            self._write(Text(text))

    def draw(self) -> None:
        with self._lock:
            if self._is_open:
                self._write()

    def ended(self, stage: Stage, *, finished: bool) -> None:
        """Leave a line of what it was."""
        with self._lock:
            if finished:
                text = outcome(stage.done, stage.seconds)
                line = self._marked("✓", "green", stage.name, text)
            else:
                amount = part_of(max(0, stage.done), stage.total)
                line = self._marked("✗", "red", stage.name, f"{amount}, not finished")
            self._write(line)

    def abandon(self) -> None:
        """For a process that ends at once: nothing is drawn any more, and the cursor gets a line of its own.

        Waits for nobody, so a thread that is stuck in the terminal cannot stop it.
        """
        if not self._is_open:
            return
        self._is_open = False
        if self._diverted:
            self._diverted.end()
        with suppress(OSError):  # no file at all, or nobody reads it any more
            terminal = self._stream.fileno()
            if select.select([], [terminal], [], 0)[1]:
                os.write(terminal, b"\r\n")

    def _marked(self, mark: str, style: str, name: str, text: str) -> Text:
        if not self._console.encoding.startswith("utf"):
            mark = "*" if mark == "✓" else "!"
        return Text.assemble((mark, style), _named(name)[1:], text, no_wrap=True)

    def _write(self, *above: RenderableType) -> None:
        """Put lines above, and draw the rest anew below them, all in one go so that nothing flickers."""
        if self._is_gone:
            return
        console = self._console
        console.size = _size(self._stream)
        lines = self._lines() if self._is_open else []
        try:
            with console.capture() as written:
                console.control(self._back())
                for renderable in above:
                    console.print(renderable, soft_wrap=True)
                for number, line in enumerate(lines):
                    console.print(Segments([Segment.line()] * bool(number) + line), end="")
            self._drawn = [Segment.get_line_length(line) for line in lines]
            self._stream.write(written.get())
            self._stream.flush()
        except OSError:  # the window was closed: nobody is left to see it, and the work goes on
            self._is_gone = True

    def _back(self) -> Control:
        """To the beginning of what is drawn, which is wiped. A line wider than the window is by now has wrapped."""
        width = self._console.width
        rows = sum(max(1, -(-cells // width)) if self._reflows else 1 for cells in self._drawn)
        wipe = (ControlType.ERASE_IN_LINE, 2)
        up = ((ControlType.CURSOR_UP, 1), wipe)
        return Control(ControlType.CARRIAGE_RETURN, wipe, *(up * (rows - 1))) if rows else Control()

    def _lines(self) -> list[list[Segment]]:
        """What is drawn now, no higher than the window: what runs is dropped last."""
        width, height = self._console.size
        # A line that fills the window to its edge leaves some cursors on it and some on the next.
        width = max(1, min(width - 1, _WIDEST))
        overview = self._overview
        options = self._console.options.update(width=width, no_wrap=True, overflow="crop")
        running = [part for stage in overview.running for part in _running(stage, width)]
        total = _total(overview, width)
        to_come = [_to_come(stage) for stage in overview.to_come]
        left = height - 1 - len(running) - 1
        if len(to_come) > left:
            names = ", ".join(stage.name for stage in overview.to_come)
            to_come = [Text(f"{_GAP}then {names}", style="dim")][: max(0, left)]
        drawn: list[list[Segment]] = []
        for renderable in (*running, *to_come, total):
            drawn += self._console.render_lines(renderable, options, pad=False)
        return drawn[: max(1, height - 1)]


def _running(stage: Stage, width: int) -> Iterator[RenderableType]:
    """Name, bar, percentage and amounts in one line, or in two where they do not fit beside each other."""
    done = max(0, stage.done)
    share = min(1.0, done / stage.total)
    name, percent = _named(stage.name), f"{int(100 * share)}%"
    room = width - cell_len(name) - len(_GAP) - _PERCENT_WIDTH
    in_one_line = room >= len(_GAP) + _AMOUNTS_WIDTH + _SHORTEST_BAR
    bar_width = room - len(_GAP) - _AMOUNTS_WIDTH if in_one_line else room
    amounts = _amounts(stage, _AMOUNTS_WIDTH if in_one_line else width - len(_GAP))
    bar = ProgressBar(
        stage.total,
        min(done, stage.total),
        width=bar_width,
        style="bright_black",
        complete_style="cyan",
        finished_style="cyan",
    )
    if bar_width < _SHORTEST_BAR:
        yield Text(f"{name}{percent}")
    else:
        row = Table.grid()
        row.add_column(no_wrap=True)
        row.add_column(width=bar_width)
        row.add_column(no_wrap=True)
        beside = f"{_GAP}{percent:>{_PERCENT_WIDTH}}" + (f"{_GAP}{amounts}" if in_one_line else "")
        row.add_row(name, bar, beside)
        yield row
    if not in_one_line:
        yield Text(f"{_GAP}{amounts}")


def _amounts(stage: Stage, width: int) -> str:
    """Bytes of bytes, rate, and the time that is left, as much of it as there is room for."""
    size, *others = standing(max(0, stage.done), stage.total, stage.rate(), stage.remaining())
    shorter = size.replace(" of ", "/")
    return _fitting(width, [size, *others], [shorter, *others], others)


def _to_come(stage: Upcoming) -> Text:
    size = "" if stage.size is None else human_size(stage.size)
    bound = "up to " if stage.at_most and size else ""
    return Text(f"{_named(stage.name)}{bound}{size}", style="dim")


def _total(overview: Overview, width: int) -> Text:
    """The time the run has taken and, where it can be told, will take."""
    more = len(overview.later)
    foretold = overview.remaining()
    about = "about " if overview.to_come or more else ""
    left = [f"{about}{clock(foretold)} left"] if foretold is not None else []
    models = [f"{more} more model{'s' if more != 1 else ''} to come"] if more else []
    elapsed = clock(overview.seconds)
    parts = [f"{elapsed} elapsed", *left, *models], [elapsed, *left, *models], [elapsed, *left]
    name = _named("Total")
    return Text(f"{name}{_fitting(width - cell_len(name), *parts)}", style="dim")


def _named(name: str) -> str:
    return f"{_GAP}{name:<{_NAME_WIDTH}}{_GAP}"


def _fitting(width: int, *ways: list[str]) -> str:
    """The first way of saying it that fits; the last one otherwise."""
    for parts in ways:
        text = ", ".join(parts)
        if cell_len(text) <= width:
            break
    return text


def _size(stream: TextIO) -> tuple[int, int]:
    """Columns and rows of this very terminal; the usual for one that does not know, as in `docker run -t` and CI."""
    try:
        columns, rows = os.get_terminal_size(stream.fileno())
    except (OSError, ValueError):  # no terminal, or no file at all
        columns = rows = 0
    usual = shutil.get_terminal_size()
    return columns or usual.columns, rows or usual.lines


def _reflows(environment: Mapping[str, str]) -> bool:
    """Whether a window made narrower wraps the lines it shows. Few still cut them off; they are known by these."""
    terminal = environment.get("TERM", "")
    if terminal.startswith("screen"):
        return "TMUX" in environment
    return terminal != "linux" and "XTERM_VERSION" not in environment
