"""What a person sees while stages run, on a terminal and off it."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from preparation.errors import CancelledStageError
from preparation.hub import _ForwardingBar
from preparation.progress import Progress


def test_off_a_terminal_each_stage_is_one_line() -> None:
    out = io.StringIO()
    with Progress(out).stage("Download", 3_000_000) as stage:
        stage.advance(1_000_000)
        stage.advance(2_000_000)
    (line,) = out.getvalue().splitlines()
    assert line.startswith("Download: 3 MB in ")


def test_off_a_terminal_a_long_stage_is_heard_of_again_and_again() -> None:
    reading, writing = os.pipe()
    with open(reading) as log, open(writing, "w") as stream:  # noqa: PTH123 - no paths
        progress = Progress(stream, log_seconds=0.01)
        with progress.stage("Download", 6_940_000_000) as stage:
            assert log.readline() == "Download: 0.00 of 6.94 GB\n"
            stage.advance(2_980_000_000)
            while (line := log.readline()) == "Download: 0.00 of 6.94 GB\n":
                pass
            assert line == "Download: 2.98 of 6.94 GB\n"


def test_off_a_terminal_a_stage_that_failed_is_not_said_to_have_ended() -> None:
    out = io.StringIO()

    def fail() -> None:
        with Progress(out).stage("Upload", 10):
            raise ValueError("as it happens")

    with pytest.raises(ValueError, match="as it happens"):
        fail()
    assert out.getvalue() == ""


def test_log_is_no_terminal_though_colours_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    out = io.StringIO()
    with Progress(out).stage("Upload", 10) as stage:
        stage.advance(10)
    assert out.getvalue().startswith("Upload: 10 B in ")


def test_stage_with_nothing_to_do_is_not_mentioned() -> None:
    out = io.StringIO()
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
