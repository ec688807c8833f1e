"""Where the seconds of a cold start went: phases on one clock, as plain values and as a picture.

It records and draws, and knows nothing of what the phases do. Standard library alone: it is imported first of all.
"""

from __future__ import annotations

import json
import logging
import math
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

JSON_NAME = "cold-start.json"
SVG_NAME = "cold-start.svg"
WRITE_SECONDS = 0.5  # between two looks at whether there is something to write while it goes on
Plain = str | int | float | bool | None

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Phase:
    """Something that took from `start` to `end`, in seconds after the process began.

    `after` names the phases it needed the results of, whole or as they came.
    """

    name: str
    start: float
    end: float
    after: tuple[str, ...] = ()
    details: Mapping[str, Plain] = field(default_factory=dict, hash=False)

    @property
    def seconds(self) -> float:
        return self.end - self.start


@dataclass(eq=False)
class _Running:
    """A phase that has begun and is not recorded yet."""

    name: str
    start: float
    after: tuple[str, ...]
    so_far: Callable[[], Mapping[str, Any]] = dict
    ended: Callable[[], float | None] = lambda: None


class ColdStart:
    """Records the phases of one cold start. Safe to use from many threads; gives out plain values."""

    def __init__(self, started: float | None = None, *, model: str = "", version: str = "") -> None:
        """`started` is a `time.monotonic()`; without it, the moment the system started this process."""
        self.model = model
        self.version = version
        self._started = process_start() if started is None else started
        self._started_at = datetime.now(UTC) - timedelta(seconds=time.monotonic() - self._started)
        self._ready: float | None = None
        self._phases: list[Phase] = []
        self._running: list[_Running] = []
        self._counters: Counter[str] = Counter()
        self._lock = threading.Lock()

    @contextmanager
    def phase(self, name: str, *, after: Sequence[str] = ()) -> Iterator[dict[str, Any]]:
        """Time a block. It is given a dictionary for details; a block that raises is noted as failed."""
        details: dict[str, Any] = {}
        running = self._begin(_Running(name, time.monotonic(), tuple(after)))
        try:
            yield details
        except BaseException:
            details["failed"] = True
            raise
        finally:
            self._record(name, running.start, time.monotonic(), after, details, ended=(running,))

    def begin(
        self,
        name: str,
        start: float | None = None,
        *,
        after: Sequence[str] = (),
        so_far: Callable[[], Mapping[str, Any]] = dict,
        ended: Callable[[], float | None] = lambda: None,
    ) -> None:
        """Show a phase as in progress until `add` records it.

        `start` is a `time.monotonic()`; without it, now. `so_far` gives details that grow, and `ended` the moment at
        which it ended where that is known before it is recorded. Both are asked from other threads.
        """
        begun = time.monotonic() if start is None else start
        self._begin(_Running(name, begun, tuple(after), so_far, ended))

    def give_up(self) -> None:
        """Record what is in progress as failed: nobody works on it any more. Raises nothing."""
        with self._lock:
            running = tuple(self._running)
        now = time.monotonic()
        for phase in running:
            self._record(
                phase.name, phase.start, now, phase.after, {"failed": True}, ended=(phase,)
            )

    def add(
        self, name: str, start: float, end: float, *, after: Sequence[str] = (), **details: Any
    ) -> None:
        """Record a phase timed elsewhere on `time.monotonic()`.

        `after` names phases it could not end before: a tensor is moved to the device only once its bytes are there.
        Without it, a phase is taken to follow the one that ended last before it began. Of the details, `bytes` and
        `seconds_of_cpu` are drawn, and all are kept.
        """
        with self._lock:
            ended = tuple(phase for phase in self._running if phase.name == name)
        self._record(name, start, end, after, details, ended=ended)

    def _begin(self, phase: _Running) -> _Running:
        with self._lock:
            self._running.append(phase)
        return phase

    def _record(
        self,
        name: str,
        start: float,
        end: float,
        after: Sequence[str],
        details: Mapping[str, Any],
        *,
        ended: Sequence[_Running],
    ) -> None:
        phase = Phase(
            name,
            round(start - self._started, 6),
            round(max(start, end) - self._started, 6),
            tuple(after),
            {key: _plain(value) for key, value in details.items()},
        )
        with self._lock:
            self._phases.append(phase)
            self._running = [running for running in self._running if running not in ended]

    def count(self, name: str, amount: int = 1) -> None:
        """Add to a counter, such as requests or retries."""
        with self._lock:
            self._counters[name] += amount

    def ready(self) -> None:
        """Note that requests are served from now on; the first time counts. What ends later was not waited for."""
        with self._lock:
            if self._ready is None:
                self._ready = round(time.monotonic() - self._started, 6)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON. Seconds since the process's start; `ready_after_s` is None until `ready`.

        A phase that goes on has `in_progress` and ends now: it has a length so far, and no end yet.
        """
        phases, counters, ready = self._now()
        shown = sorted([*phases, *self._so_far()], key=lambda phase: (phase.start, phase.end))
        return {
            "model": self.model,
            "version": self.version,
            "started_at": self._started_at.isoformat(timespec="milliseconds"),
            "ready_after_s": ready,
            "phases": [_fields(phase) for phase in shown],
            "critical_path": [
                {"name": phase.name, "start_s": start, "end_s": end}
                for phase, start, end in critical_path(phases, ready)
            ],
            "counters": counters,
        }

    def as_svg(self) -> str:
        """A picture that needs nothing else: one bar for each phase, solid where READY waited for it."""
        phases, counters, ready = self._now()
        heading = f"Cold start of {self.model}" if self.model else "Cold start"
        began = self._started_at.strftime("%Y-%m-%d %H:%M:%S UTC")
        origin = f"version {self.version}, started {began}" if self.version else f"started {began}"
        from weights.waterfall_picture import draw  # which nobody needs before the end

        return draw(phases, counters, ready, heading, origin)

    @contextmanager
    def written_to(self, folder: Path) -> Iterator[None]:
        """Keep cold-start.json in `folder` current while the block runs, and write both files at its end.

        A thread of its own writes twice a second at most, and only what changed. It never fails the block.
        """
        over = threading.Event()
        writer = threading.Thread(
            target=self._write_until, args=(over, folder), name="cold-start", daemon=True
        )
        writer.start()
        try:
            yield
        finally:
            over.set()
            writer.join()  # or it could write what is older over what is newer
            self.write(folder)

    def _write_until(self, over: threading.Event, folder: Path) -> None:
        written = None
        while not over.is_set():
            try:
                document = self.as_dict()
                if document != written:
                    folder.mkdir(parents=True, exist_ok=True)
                    _replace(folder / JSON_NAME, _json(document))
                    written = document
            except Exception as error:  # noqa: BLE001 - a picture of the start must not end it
                # The last writing, at the end, warns of what lasts.
                logger.debug("cold-start.json cannot be written now: %s", error)
            over.wait(WRITE_SECONDS)

    def write(self, folder: Path) -> tuple[Path, Path]:
        """Write cold-start.json and cold-start.svg, each whole or not at all.

        A folder that cannot be written to is a warning in the log: nothing here may keep a server from serving.
        """
        paths = folder / JSON_NAME, folder / SVG_NAME
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _replace(paths[0], _json(self.as_dict()))
            _replace(paths[1], self.as_svg())
        except (
            OSError,
            ValueError,
            ArithmeticError,
        ) as error:  # the latter two: times that are no times
            logger.warning(
                "the record of this cold start could not be written to %s: %s. Serving goes on; give it a folder "
                "that can be written to",
                folder,
                error,
            )
        return paths

    def _so_far(self) -> list[Phase]:
        with self._lock:
            running = tuple(self._running)
        now = time.monotonic()
        phases = []
        for phase in running:
            details, end = _details_of(phase), phase.ended()
            if end is None:
                details["in_progress"] = True
            start, end = phase.start - self._started, max(phase.start, end or now) - self._started
            phases.append(Phase(phase.name, round(start, 6), round(end, 6), phase.after, details))
        return phases

    def _now(self) -> tuple[list[Phase], dict[str, int], float | None]:
        with self._lock:
            phases = sorted(self._phases, key=lambda phase: (phase.start, phase.end))
            return phases, dict(self._counters), self._ready


def process_start() -> float:
    """When the system started this process, as a `time.monotonic()`; now, where the system does not say."""
    now = time.monotonic()
    try:
        # The name, in brackets, may have spaces; field 22 is the start in ticks after boot. See proc(5).
        fields = Path("/proc/self/stat").read_text("utf-8", "replace").rpartition(")")[2].split()
        since_boot = int(fields[19]) / os.sysconf("SC_CLK_TCK")
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - since_boot
    except (OSError, ValueError, IndexError, AttributeError):
        return now
    return now - age if since_boot > 0 and age > 0 else now


def critical_path(
    phases: Sequence[Phase], ready: float | None = None
) -> list[tuple[Phase, float, float]]:
    """The phases that READY waited for, each with the part (start, end) of it that was waited for, in order.

    Backwards from the last that ended before `ready`: a phase is waited for since the last of those it needed ended,
    and so is that one in turn.
    """
    path: list[tuple[Phase, float, float]] = []
    left = [phase for phase in phases if ready is None or phase.end <= ready]
    current = max(left, key=lambda phase: (phase.end, phase.start), default=None)
    until = current.end if current else 0.0
    while current:
        left.remove(current)
        needed = [phase for phase in left if phase.name in current.after and phase.end <= until]
        before = needed or [phase for phase in left if phase.end <= current.start]
        previous = max(before, key=lambda phase: phase.end, default=None)
        since = max(current.start, previous.end) if previous else current.start
        if until > since:
            path.append((current, since, until))
        until = min(previous.end, until) if previous else since
        current = previous
    return path[::-1]


def _fields(phase: Phase) -> dict[str, Any]:
    fields = {"name": phase.name, "start_s": phase.start, "end_s": phase.end}
    fields["after"] = list(phase.after)
    return fields | dict(phase.details) | fields  # a detail cannot take a field's place


def _details_of(phase: _Running) -> dict[str, Plain]:
    return {key: _plain(value) for key, value in phase.so_far().items()}


def _json(document: Mapping[str, Any]) -> str:
    return json.dumps(document, indent=1, allow_nan=False) + "\n"


def _plain(value: Any) -> Plain:
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value)


def _replace(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}")
    try:
        with partial.open("x", encoding="utf-8") as file:
            file.write(text)
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
