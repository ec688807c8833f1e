"""What a person sees while stages run, on a terminal and off it."""

from __future__ import annotations

import fcntl
import io
import os
import signal
import struct
import subprocess
import sys
import termios
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from preparation.errors import CancelledStageError
from preparation.hub import _ForwardingBar
from preparation.progress import Progress, human_size


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_off_a_terminal_each_stage_is_one_line() -> None:
    out = io.StringIO()
    with Progress(out).stage("Download", 3_000_000) as stage:
        stage.advance(1_000_000)
        stage.advance(2_000_000)
    (line,) = out.getvalue().splitlines()
    assert line.startswith("Download: 3 MB in ")


def test_on_a_terminal_a_bar_is_drawn() -> None:
    out = Terminal()
    with Progress(out).stage("Upload", 10) as stage:
        stage.advance(10)
    assert "Upload: 100%" in out.getvalue()


@pytest.mark.parametrize(("columns", "width"), [(0, 80), (50, 50)])
def test_bar_is_as_wide_as_the_terminal_or_usual_where_that_knows_no_width(
    monkeypatch: pytest.MonkeyPatch, columns: int, width: int
) -> None:
    # given standard error on a terminal of that many columns
    monkeypatch.delenv("COLUMNS", raising=False)
    screen, terminal = os.openpty()
    fcntl.ioctl(
        terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24 * bool(columns), columns, 0, 0)
    )
    with open(terminal, "w") as stream:  # noqa: PTH123 - no path
        monkeypatch.setattr(sys, "stderr", stream)
        # when
        with Progress(stream).stage("Upload", 10) as stage:
            stage.advance(10)
        shown = ""
        while "100%" not in shown:  # a terminal hands on what was written piece by piece
            shown += os.read(screen, 10_000).decode()
    os.close(screen)
    # then
    bar = shown.strip().split("\r")[-1]
    assert "100%|█" in bar
    assert width - 2 <= len(bar) <= width


def test_stage_with_nothing_to_do_is_not_mentioned() -> None:
    for out in (io.StringIO(), Terminal()):
        with Progress(out).stage("Convert", 0):
            pass
        assert out.getvalue() == ""


def test_bytes_are_counted_from_many_threads() -> None:
    with (
        Progress(io.StringIO()).stage("Hash", 8000) as stage,
        ThreadPoolExecutor(8) as pool,
    ):
        for _ in range(8000):
            pool.submit(stage.advance, 1)
    assert stage.done == 8000


def test_interrupt_stops_the_threads_of_a_running_stage() -> None:
    progress = Progress(io.StringIO())
    with (
        pytest.raises(KeyboardInterrupt),
        progress.stopping_on_signals(),
        progress.stage("Upload", 10) as stage,
    ):
        signal.raise_signal(signal.SIGINT)
    with pytest.raises(CancelledStageError):
        stage.advance(1)


_STUCK = """
import signal, threading
from concurrent.futures import ThreadPoolExecutor
from preparation import Progress
with Progress().stopping_on_signals(patience=0.1), ThreadPoolExecutor() as pool:
    pool.submit(threading.Event().wait)
    signal.raise_signal(signal.SIGINT)
"""


def test_interrupt_ends_a_pool_whose_thread_hears_of_nothing() -> None:
    ended = subprocess.run(
        [sys.executable, "-c", _STUCK],
        cwd=Path(__file__).resolve().parents[2],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode == 130
    assert ended.stderr.strip() == (
        "Interrupted. Run the same command again: finished files are kept."
    )


def test_hubs_client_finds_on_the_bar_all_it_looks_for() -> None:
    """As huggingface_hub drives it for files in Xet storage, which the loopback Hub does not have."""
    from huggingface_hub.utils._xet_progress_reporting import XetDownloadProgressReporter

    moved: list[int] = []
    bar = type("Bar", (_ForwardingBar,), {"on_bytes": staticmethod(moved.append)})

    class Report:
        total_bytes = 100
        total_bytes_completed = 60
        total_bytes_completion_rate = 1.0
        total_transfer_bytes_completed = 80
        total_transfer_bytes_completion_rate = 1.0

    options = {"reconstruction_desc": "x", "total": 100, "log_level": 20, "tqdm_class": bar}
    with XetDownloadProgressReporter(**options) as reporter:
        reporter.update_progress(Report())
    assert moved == [60]  # bytes on disk, not those off the wire


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1500, "1.5 kB"),
        (5_135_149_760, "5.14 GB"),
        (167_335_342, "167 MB"),
    ],
)
def test_sizes_read_as_on_the_hub(size: int, text: str) -> None:
    assert human_size(size) == text
