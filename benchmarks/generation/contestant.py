"""A process that makes images one way, seen from outside: started, asked, and ended."""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any, Self

from benchmarks.generation.model import Job
from benchmarks.generation.ways import NotHereError
from benchmarks.wire.memory import ROOT

LONGEST = 1500.0  # seconds for one answer; autotuning all of SDXL takes a good part of it
KEPT = ("HOME", "LANG", "LD_LIBRARY_PATH", "PATH", "PYTHONPATH", "TMPDIR", "VIRTUAL_ENV")
KEPT_BEGINNINGS = ("CUDA_", "GOMP_", "NVIDIA_", "OMP_")


class Contestant:
    """From its start to the end of the block. `started` and `ready` are moments of `time.monotonic()`.

    Caches of compiled code begin empty and end with it, so that nobody profits from an earlier one.
    Raises `NotHereError` when it cannot be had, or ends before it has answered.
    """

    def __init__(self, way: str, job: Job) -> None:
        self._way = way
        self._job = job
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed in __exit__
        self._caches = tempfile.mkdtemp(prefix="bench-caches-")
        self.started = time.monotonic()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.generation.run_one", way, job.dump()],
            cwd=ROOT,
            env=environment() | _empty(self._caches) | job.secrets,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        self.ready = 0.0

    def __enter__(self) -> Self:
        self.wait_until_ready()
        return self

    def wait_until_ready(self) -> None:
        """Or raise, and then its process has ended."""
        try:
            answer = self._answer()
            if "skipped" in answer:
                raise NotHereError(answer["skipped"])
        except BaseException:
            self._end()
            raise
        self.ready = answer["finished"]

    def __exit__(self, *_: object) -> None:
        self._end()

    def ask(self, question: str, **arguments: Any) -> dict[str, Any]:
        """One question, one answer (see `run_one.Answers`)."""
        assert self._process.stdin is not None  # noqa: S101 - for the type checker
        with contextlib.suppress(BrokenPipeError):  # then it has ended, and `_answer` finds out why
            self._process.stdin.write(json.dumps({"ask": question, **arguments}) + "\n")
            self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None  # noqa: S101
        # One line for one question, so nothing is ever left in the reader's buffer.
        readable, _, _ = select.select([self._process.stdout], [], [], LONGEST)
        if not readable:
            raise NotHereError(f"no answer within {LONGEST:.0f} seconds")
        line = self._process.stdout.readline()
        if not line:
            raise NotHereError(f"it failed: {self._last_words_of_all()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def last_words(self) -> str:
        """The last line of its errors and warnings so far; nothing if there is none."""
        # Without moving the place in the file, where its process goes on writing.
        size = os.fstat(self._errors.fileno()).st_size
        return last_line(os.pread(self._errors.fileno(), size, 0).decode(errors="replace"))

    def _last_words_of_all(self) -> str:
        self._process.wait()
        return self.last_words() or f"exit status {self._process.returncode}"

    def kill(self) -> None:
        """Whoever waits for its answer in another thread gets an error; nothing is tidied up yet."""
        self._process.kill()

    def _end(self) -> None:
        self.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
        self._process.wait()
        self._errors.close()
        shutil.rmtree(self._caches, ignore_errors=True)


def begin(way: str, job: Job, exits: ExitStack) -> Contestant:
    """Start one that ends with `exits`, and wait for nothing (see `wait_until_ready`)."""
    with uninterrupted():
        return exits.push(Contestant(way, job))


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """For the main thread: what is started in the block is known to somebody who ends it before a signal is heard."""
    came: list[int] = []
    heard = {
        number: signal.signal(number, lambda number, _: came.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in heard.items():
            signal.signal(number, handler)
        if came:
            signal.raise_signal(came[0])


def last_line(text: str) -> str:
    """The last that says something, or nothing."""
    said = (line.strip() for line in reversed(text.splitlines()))
    return next(filter(None, said), "")


def environment() -> dict[str, str]:
    """The same for all, and nothing of the caller's own settings."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name in KEPT or name.startswith(KEPT_BEGINNINGS)
    }
    return kept | {"HF_HUB_OFFLINE": "1"}


def _empty(caches: str) -> dict[str, str]:
    """Triton's is where torch itself would have it, inside its own: what was published for there is found there."""
    inductor = f"{caches}/inductor"
    return {"TORCHINDUCTOR_CACHE_DIR": inductor, "TRITON_CACHE_DIR": f"{inductor}/triton/0"}
