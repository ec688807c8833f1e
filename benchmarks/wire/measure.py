"""Running the measured processes: one at a time in a new order every round, or several at once."""

from __future__ import annotations

import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from benchmarks.wire.memory import ROOT, of_tree, warm_free_memory
from benchmarks.wire.target import KEY, REGION, Target

WARM_TIMES = 3  # as much free memory as this many models is made warm before a measurement
LONGEST = 900.0  # seconds a measurement may take
SAMPLE_EVERY = 0.01  # seconds between two looks at a process's memory
SEED = 20261123


class Skipped(Exception):  # noqa: N818 - no error: the report says what was left out, and why
    """This way cannot be measured here."""


@dataclass(frozen=True)
class Way:
    """A way of reading a model: the function that prepares it and its options.

    Of a `family`, the best way counts. `pinned` ways are compared with raw sockets of as many connections.
    """

    name: str
    family: str
    function: str
    options: dict[str, Any] = field(default_factory=dict)
    pinned: int | None = None


@dataclass
class Found:
    """What was measured of one way; `skipped` says why nothing was."""

    way: Way
    seconds: list[float] = field(default_factory=list)
    answers: list[dict[str, Any]] = field(default_factory=list)
    skipped: str = ""

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def plain(self) -> dict[str, Any]:
        """As JSON, for the report and for whoever wants to look again."""
        way = self.way
        return {
            "name": way.name,
            "family": way.family,
            "pinned": way.pinned,
            "options": way.options,
            "seconds": [round(seconds, 4) for seconds in self.seconds],
            "answers": self.answers,
            "skipped": self.skipped,
        }


def progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def environment(target: Target) -> dict[str, str]:
    """The same for all: keys, region and endpoint, the certificate, and nothing of the caller's own."""
    foreign = ("AWS_", "COLD_", "DTYPE", "IMAGE_", "MODEL_", "PUBLIC_", "RUNAI_", "S3_")
    proxies = ("http_proxy", "https_proxy", "all_proxy")
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(foreign) and name.lower() not in proxies
    }
    told = {
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": KEY,
        "AWS_REGION": REGION,
        "AWS_DEFAULT_REGION": REGION,
        "AWS_ENDPOINT_URL": target.endpoint,
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        "AWS_EC2_METADATA_DISABLED": "true",
        "NO_PROXY": "127.0.0.1",
    }
    if target.certificate:
        told["AWS_CA_BUNDLE"] = target.certificate
    return kept | told


class Reader:
    """A process that has imported all it needs and waits to be told to read."""

    def __init__(self, way: Way, target: Target, target_file: Path) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed in __exit__
        options = json.dumps(way.options)
        self._way = way
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.wire.run_one", way.function, options, target_file],
            cwd=ROOT,
            env=environment(target),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        self._watchdog = threading.Timer(LONGEST, self.process.kill)
        self._watchdog.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._watchdog.cancel()
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout, self._errors):
            if pipe:
                pipe.close()

    def answer(self) -> dict[str, Any]:
        """Its next line. Raises Skipped when it cannot go on."""
        assert self.process.stdout is not None  # noqa: S101 - for the type checker
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            self._errors.seek(0)
            said = self._errors.read().decode(errors="replace").strip().splitlines()
            raise Skipped(f"it failed: {said[-1] if said else 'without a word'}")
        answer: dict[str, Any] = json.loads(line)
        if "skipped" in answer:
            raise Skipped(answer["skipped"])
        return answer

    def tell(self) -> None:
        assert self.process.stdin is not None  # noqa: S101 - for the type checker
        self.process.stdin.write("\n")
        self.process.stdin.flush()


@contextmanager
def told_target(target: Target) -> Iterator[Path]:
    """The target in a file, and its scratch folder gone before and after."""
    shutil.rmtree(target.scratch, ignore_errors=True)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "target.json"
        file.write_text(target.dump())
        try:
            yield file
        finally:
            shutil.rmtree(target.scratch, ignore_errors=True)


def measure(way: Way, target: Target, *, memory: bool = False) -> dict[str, Any]:
    """One measurement, over warm free memory; with `memory`, also the tree's peak over what imports took.

    Looking at its memory takes a process a percent of its time, so it is done where time is not the question.
    """
    with told_target(target) as file, Reader(way, target, file) as reader:
        reader.answer()
        warm_free_memory(WARM_TIMES * target.file_bytes)
        before = of_tree(reader.process.pid)
        with _peak_of(reader.process.pid) if memory else _nothing() as peak:
            reader.tell()
            answer = reader.answer()
    if answer["bytes"] not in (target.file_bytes, target.tensor_bytes):
        raise Skipped(f"it read {answer['bytes']:,} bytes of {target.file_bytes:,}")
    if memory:
        answer["tree_peak"] = max(peak) - before
    return answer


def measure_together(way: Way, target: Target, count: int) -> list[dict[str, Any]]:
    """`count` processes told to read at the same moment."""
    with told_target(target) as file:
        readers: list[Reader] = []
        try:
            for _ in range(count):
                readers.append(Reader(way, target, file))  # noqa: PERF401 - each must be ended
            for reader in readers:
                reader.answer()
            warm_free_memory(max(WARM_TIMES, count + 1) * target.file_bytes)
            for reader in readers:
                reader.tell()
            return [reader.answer() for reader in readers]
        finally:
            for reader in readers:
                reader.__exit__()


def in_rounds(title: str, ways: Sequence[Way], target: Target, rounds: int) -> list[Found]:
    """Every way once a round, in a new order each time, so that a slow minute falls on all alike."""
    found = [Found(way) for way in ways]
    order = random.Random(SEED)
    for number in range(rounds):
        turns = [one for one in order.sample(found, len(found)) if not one.skipped]
        for turn, one in enumerate(turns, start=1):
            where = f"[{title}, round {number + 1} of {rounds}, {turn} of {len(turns)}]"
            try:
                answer = measure(one.way, target)
            except Skipped as reason:
                one.skipped = str(reason)
                progress(f"{where} {one.way.name}: skipped, {reason}")
                continue
            seconds = answer["seconds"]
            one.seconds.append(seconds)
            one.answers.append(answer)
            rate = target.file_bytes / seconds / 1e9
            progress(f"{where} {one.way.name}: {seconds:.2f} s, {rate:.2f} GB/s")
    return found


@contextmanager
def _peak_of(process: int) -> Iterator[list[int]]:
    """Look at the process's memory until the block ends; the list grows."""
    seen = [0]
    ended = threading.Event()

    def look() -> None:
        while not ended.wait(SAMPLE_EVERY):
            seen.append(of_tree(process))

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield seen
    finally:
        ended.set()
        thread.join()
        seen.append(of_tree(process))


@contextmanager
def _nothing() -> Iterator[list[int]]:
    yield [0]
