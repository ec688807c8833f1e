"""The display on a terminal, as it stands on the screen."""

from __future__ import annotations

import logging
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from preparation.progress import Progress
from preparation.stages import Upcoming
from tests.preparation.test_stages import Clock
from tests.support.screen import PseudoTerminal, Screen

ROOT = Path(__file__).resolve().parents[2]
STAGES = (
    Upcoming("Download", 6_940_000_000),
    Upcoming("Convert", 2_810_000_000, at_most=True),
    Upcoming("Hash", None),
    Upcoming("Upload", 6_940_000_000, at_most=True),
)
Open = Callable[..., PseudoTerminal]


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR", "TMUX", "XTERM_VERSION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")


@pytest.fixture
def terminal() -> Iterator[PseudoTerminal]:
    with PseudoTerminal(80) as opened:
        yield opened


@pytest.fixture
def clock() -> Clock:
    return Clock()


def shows(*texts: str) -> Callable[[Screen], bool]:
    return lambda screen: all(any(text in line for line in screen.lines) for text in texts)


def frame(progress: Progress, terminal: PseudoTerminal) -> list[str]:
    """The screen as it stands after one whole frame that shows the present."""
    with progress._display._lock:
        progress._display.draw()
        return terminal.settle()


WIDE = """\
✓ Download  6.94 GB in 1:40, 69.4 MB/s
  Convert   ━━━━━━━━━╺━━━━━━━━   50%  1.41 of 2.81 GB, 70.2 MB/s, 0:20 left
  Hash
  Upload    up to 6.94 GB
  Total     2:00 elapsed, 1 more model to come"""

NARROW = """\
✓ Download  6.94 GB in 1:40, 69.4 MB/s
  Convert   ━━━━━━━━━━╸━━━━━━━━━━   50%
  1.41 of 2.81 GB, 70.2 MB/s, 0:20 left
  Hash
  Upload    up to 6.94 GB
  Total     2:00, 1 more model to come"""

# The terminal itself wraps what is there to stay.
NARROWEST = """\
✓ Download  6.94 GB in 1:4
0, 69.4 MB/s
  Convert   50%
  70.2 MB/s, 0:20 left
  Hash
  Upload    up to 6.94 GB
  Total     2:00"""


@pytest.mark.parametrize(("width", "expected"), [(80, WIDE), (40, NARROW), (26, NARROWEST)])
def test_all_stages_stand_on_one_screen(clock: Clock, width: int, expected: str) -> None:
    with PseudoTerminal(width) as terminal:
        progress = Progress(terminal.stream, clock=clock)
        with progress.over(STAGES, [STAGES]):
            with progress.stage("Download", 6_940_000_000) as stage:
                clock.now += 100
                stage.advance(6_940_000_000)
            with progress.stage("Convert", 2_810_000_000) as stage:
                clock.now += 20
                stage.advance(1_405_000_000)
                # no line is cut off, broken or left over
                assert frame(progress, terminal) == expected.splitlines()


def test_what_runs_is_taken_away_and_what_it_was_stays(
    terminal: PseudoTerminal, clock: Clock
) -> None:
    progress = Progress(terminal.stream, clock=clock)
    with progress.over(STAGES):
        for name in ("Download", "Upload"):
            with progress.stage(name, 6_940_000_000) as stage:
                assert "0.00 of 6.94 GB" in "".join(frame(progress, terminal))
                clock.now += 100
                stage.advance(6_940_000_000)
    assert terminal.settle() == [
        "✓ Download  6.94 GB in 1:40, 69.4 MB/s",
        "✓ Upload    6.94 GB in 1:40, 69.4 MB/s",
        "  Total     3:20",
    ]
    assert (terminal.screen.row, terminal.screen.column) == (3, 0)


def test_display_goes_on_by_itself(terminal: PseudoTerminal) -> None:
    with Progress(terminal.stream).stage("Upload", 10) as stage:
        for size in range(1, 10):
            stage.advance(1)
            terminal.wait_for(shows(f"{size}0%  {size} of 10 B"))


def test_time_left_is_that_of_the_whole_where_nothing_is_to_come(
    terminal: PseudoTerminal, clock: Clock
) -> None:
    progress = Progress(terminal.stream, clock=clock)
    with progress.over([]), progress.stage("Upload", 1000) as stage:
        clock.now += 10
        stage.advance(100)
        assert frame(progress, terminal)[-1] == "  Total     0:10 elapsed, 1:30 left"


def test_stage_that_did_not_end_says_how_far_it_came(
    terminal: PseudoTerminal, clock: Clock
) -> None:
    progress = Progress(terminal.stream, clock=clock)

    def fail() -> None:
        with progress.over(STAGES), progress.stage("Download", 6_940_000_000) as stage:
            stage.advance(2_000_000_000)
            raise ValueError("as it happens")

    with pytest.raises(ValueError, match="as it happens"):
        fail()
    assert terminal.settle() == ["✗ Download  2.00 of 6.94 GB, not finished"]
    assert (terminal.screen.row, terminal.screen.column) == (1, 0)


def test_stage_with_nothing_to_do_is_not_mentioned(terminal: PseudoTerminal) -> None:
    progress = Progress(terminal.stream)
    with progress.stage("Convert", 0):
        pass
    assert terminal.settle() == []
    with progress.over([Upcoming("Check", 0), *STAGES]), progress.stage("Convert", 0):
        lines = frame(progress, terminal)
    assert [line.split()[0] for line in lines] == ["Hash", "Upload", "Total"]


def test_stage_of_more_bytes_than_were_announced_shows_those(terminal: PseudoTerminal) -> None:
    progress = Progress(terminal.stream)
    with progress.stage("Hash", 10) as stage:
        stage.advance(25)
        assert frame(progress, terminal)[0].endswith("100%  25 B")
        stage.advance(-30)
        assert frame(progress, terminal)[0].endswith("0%  0 of 10 B")


def test_message_stands_above_what_is_drawn(terminal: PseudoTerminal) -> None:
    progress = Progress(terminal.stream)
    with progress.stage("Upload", 10):
        progress.say("Something [bold] to be said, " + 60 * "x")
        progress.say("\nand more")
        lines = frame(progress, terminal)
    assert lines[:4] == [f"Something [bold] to be said, {51 * 'x'}", 9 * "x", "", "and more"]
    assert [line.split()[0] for line in lines[4:]] == ["Upload", "Total"]


def test_what_others_write_to_standard_error_stands_above_too(
    terminal: PseudoTerminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stderr", terminal.stream)
    earlier = logging.StreamHandler()  # of a library, made before anything was drawn
    logger = logging.getLogger("a library of somebody's")
    logger.addHandler(earlier)
    try:
        progress = Progress()
        with progress.stage("Upload", 10):
            logger.warning("told by a handler")
            sys.stderr.write("a bar\ra bar at its end\nand half ")
            sys.stderr.write("a line\nunfinished")
            lines = frame(progress, terminal)
        assert lines[:3] == ["told by a handler", "a bar at its end", "and half a line"]
        assert [line.split()[0] for line in lines[3:]] == ["Upload", "Total"]
        # and afterwards all is as it was
        assert sys.stderr is earlier.stream is terminal.stream
        assert terminal.settle()[-1] == "unfinished"
    finally:
        logger.removeHandler(earlier)


@pytest.mark.parametrize("wraps", [True, False])
def test_window_of_another_size_is_filled_anew_and_no_piece_of_the_old_frame_stays(
    terminal: PseudoTerminal, clock: Clock, monkeypatch: pytest.MonkeyPatch, wraps: bool
) -> None:
    if not wraps:
        monkeypatch.setenv("XTERM_VERSION", "XTerm(390)")
    progress = Progress(terminal.stream, clock=clock)
    with progress.over(STAGES), progress.stage("Download", 10) as stage:
        progress.say("a line above")
        stage.advance(5)
        for width in (60, 40, 30, 50, 100):
            with progress._display._lock:  # between two frames
                terminal.resize(width, wraps=wraps)
                above, *lines = frame(progress, terminal)
            assert above == "a line above"
            # all in one line, or a bar across the window and the amounts below it
            widest, amounts = (67, []) if width == 100 else (width - 1, ["5"])
            drawn = ["Download", *amounts, "Convert", "Hash", "Upload", "Total"]
            assert [line.split()[0] for line in lines] == drawn
            assert max(map(len, lines)) == widest


def test_low_window_shows_what_runs_and_names_the_rest(clock: Clock) -> None:
    with PseudoTerminal(80, 4) as terminal:
        progress = Progress(terminal.stream, clock=clock)
        with progress.over(STAGES), progress.stage("Download", 1000):
            lines = frame(progress, terminal)
            assert [line[:12] for line in lines] == ["  Download  ", "  then Conve", "  Total     "]
            assert lines[1] == "  then Convert, Hash, Upload"


@pytest.mark.parametrize("height", [1, 2, 3, 24])
def test_window_of_any_size_holds_a_frame(clock: Clock, height: int) -> None:
    for width in (1, 2, 13, 26, 41, 71, 72, 200):
        with PseudoTerminal(width, height) as terminal:
            progress = Progress(terminal.stream, clock=clock)
            with progress.over(STAGES), progress.stage("Download", 1000) as stage:
                stage.advance(500)
                lines = frame(progress, terminal)
                assert len(lines) <= max(1, height - 1)
                assert all(len(line) <= max(1, min(width - 1, 100)) for line in lines)
                assert frame(progress, terminal) == lines


@pytest.mark.parametrize(("columns", "width"), [(None, 80), ("50", 50)])
def test_terminal_that_knows_no_size_is_taken_for_a_usual_one(
    monkeypatch: pytest.MonkeyPatch, columns: str | None, width: int
) -> None:
    if columns:
        monkeypatch.setenv("COLUMNS", columns)
    with PseudoTerminal(width, knows_its_size=False) as terminal:
        progress = Progress(terminal.stream)
        with progress.stage("Upload", 10) as stage:
            stage.advance(10)
            lines = frame(progress, terminal)
    # in one line at 80, with the amounts in a second one at 50
    assert len(lines[0]) == (48 if width == 80 else 49)


def test_dumb_terminal_gets_lines_and_no_drawing(
    terminal: PseudoTerminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "dumb")
    progress = Progress(terminal.stream)
    with progress.stage("Upload", 3_000_000) as stage:
        stage.advance(3_000_000)
    assert re.fullmatch(r"Upload: 3 MB in \d\.\d s.*", terminal.settle()[0])
    assert "\x1b[" not in terminal.written


@pytest.mark.parametrize(("variable", "coloured"), [(None, True), ("1", False)])
def test_colours_are_left_out_where_nobody_wants_them(
    terminal: PseudoTerminal, monkeypatch: pytest.MonkeyPatch, variable: str | None, coloured: bool
) -> None:
    if variable:
        monkeypatch.setenv("NO_COLOR", variable)
    progress = Progress(terminal.stream)
    with progress.stage("Upload", 10) as stage:
        stage.advance(5)
        frame(progress, terminal)
    colours = {code for code in terminal.screen.colours if re.fullmatch(r"[39]\d", code)}
    assert bool(colours) == coloured


def test_stream_that_takes_no_unicode_gets_none(clock: Clock) -> None:
    with (
        PseudoTerminal(80) as terminal,
        open(os.dup(terminal.device), "w", encoding="ascii") as stream,  # noqa: PTH123 - no path
    ):
        progress = Progress(stream, clock=clock)
        with progress.stage("Upload", 10) as stage:
            stage.advance(5)
            assert "-----" in frame(progress, terminal)[0]
        assert terminal.settle() == ["* Upload    5 B in 0.0 s"]


def test_every_frame_is_written_at_once_and_the_cursor_never_hidden(
    terminal: PseudoTerminal,
) -> None:
    written: list[str] = []
    write = terminal.stream.write
    terminal.stream.write = lambda text: (written.append(text), write(text))[1]  # type: ignore[method-assign]
    progress = Progress(terminal.stream)
    with progress.stage("Upload", 10) as stage:
        stage.advance(5)
        frame(progress, terminal)
    frames = [text for text in written if "━" in text]
    assert len(frames) >= 2
    assert all("Total" in text and text.count("Total") == 1 for text in frames)
    assert not any("\x1b[?25" in text for text in written)


def test_work_goes_on_when_the_window_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    with PseudoTerminal(80) as terminal:
        stream = open(os.dup(terminal.device), "w")  # noqa: PTH123, SIM115 - no path
        progress = Progress(stream)
        with progress.over(STAGES), progress.stage("Upload", 10) as stage:
            terminal.settle()
            os.dup2(gone_terminal(), stream.fileno())
            progress._display.draw()
            progress.say("to nobody")
            stage.advance(10)
        assert stage.done == 10


def gone_terminal() -> int:
    """The descriptor of a terminal whose window is closed: whoever writes there is told of an input/output error."""
    master, slave = os.openpty()
    os.close(master)
    return slave


def test_interruption_while_something_is_drawn_stops_no_other_thread_from_drawing() -> None:
    # given a terminal before which somebody presses Ctrl-C in the middle of a frame
    with PseudoTerminal(80) as terminal:
        write = terminal.stream.write

        def interrupting(text: str) -> int:
            terminal.stream.write = write  # type: ignore[method-assign]
            count = write(text)
            signal.raise_signal(signal.SIGINT)
            return count

        terminal.stream.write = interrupting  # type: ignore[method-assign]
        progress = Progress(terminal.stream)
        # when
        with (
            pytest.raises(KeyboardInterrupt),
            progress.stopping_on_signals(),
            progress.stage("Upload", 10),
        ):
            raise AssertionError("it was to be interrupted before")
        # then
        other = threading.Thread(target=progress.say, args=("still here",), daemon=True)
        other.start()
        other.join(timeout=30)
        assert not other.is_alive()
        assert terminal.wait_for(shows("still here"))[-1] == "still here"


_RUN = """
import signal, sys, threading
from concurrent.futures import ThreadPoolExecutor
from preparation import Progress, end_interrupted
progress = Progress()
try:
    with (
        progress.stopping_on_signals(patience=float(sys.argv[1])),
        progress.stage("Upload", 10),
        ThreadPoolExecutor() as pool,
    ):
        if sys.argv[2] == "stuck":
            pool.submit(threading.Event().wait)
        print("running", flush=True)
        threading.Event().wait()
except KeyboardInterrupt:
    end_interrupted()
"""
_LAST = "Interrupted. Run the same command again: finished files are kept."


@pytest.fixture
def run(terminal: PseudoTerminal) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """A program on the terminal, in the middle of a stage."""
    children: list[subprocess.Popen[str]] = []

    def start(*arguments: object) -> subprocess.Popen[str]:
        child = subprocess.Popen(
            [sys.executable, "-c", _RUN, *map(str, arguments)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=terminal.device,
            text=True,
        )
        children.append(child)
        assert child.stdout is not None
        assert child.stdout.readline() == "running\n"
        terminal.wait_for(shows("0 of 10 B"))
        return child

    yield start
    for child in children:
        child.kill()
        child.wait()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_program_leaves_whole_lines_and_its_last_word(
    terminal: PseudoTerminal, run: Callable[..., subprocess.Popen[str]], number: int
) -> None:
    child = run(20, "waiting")
    child.send_signal(number)
    assert child.wait(timeout=60) == 130
    assert terminal.settle() == ["✗ Upload    0 of 10 B, not finished", "", _LAST]
    assert terminal.screen.column == 0


def test_stuck_program_that_gives_up_leaves_the_cursor_on_a_line_of_its_own(
    terminal: PseudoTerminal, run: Callable[..., subprocess.Popen[str]]
) -> None:
    child = run(0.1, "stuck")
    child.send_signal(signal.SIGINT)
    assert child.wait(timeout=60) == 130
    lines = terminal.settle()
    assert [line.split()[0] for line in lines if line] == ["Upload", "Total", "Interrupted."]
    assert lines[-1] == _LAST
    assert terminal.screen.column == 0


def test_second_interruption_ends_at_once_on_a_line_of_its_own(
    terminal: PseudoTerminal, run: Callable[..., subprocess.Popen[str]]
) -> None:
    child = run(60, "stuck")
    child.send_signal(signal.SIGINT)
    terminal.wait_for(shows("Stopping. Ctrl-C again ends at once."))
    child.send_signal(signal.SIGINT)
    assert child.wait(timeout=60) == 130
    lines = terminal.settle()
    assert [line.split()[0] for line in lines if line] == ["Stopping.", "Upload", "Total"]
    assert (terminal.screen.row, terminal.screen.column) == (len(lines), 0)
