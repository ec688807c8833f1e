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
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

JSON_NAME = "cold-start.json"
SVG_NAME = "cold-start.svg"
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
        self._counters: Counter[str] = Counter()
        self._lock = threading.Lock()

    @contextmanager
    def phase(self, name: str, *, after: Sequence[str] = ()) -> Iterator[dict[str, Any]]:
        """Time a block. It is given a dictionary for details; a block that raises is noted as failed."""
        start = time.monotonic()
        details: dict[str, Any] = {}
        try:
            yield details
        except BaseException:
            details["failed"] = True
            raise
        finally:
            self._record(name, start, time.monotonic(), after, details)

    def add(
        self, name: str, start: float, end: float, *, after: Sequence[str] = (), **details: Any
    ) -> None:
        """Record a phase timed elsewhere on `time.monotonic()`.

        `after` names phases it could not end before: a tensor is moved to the device only once its bytes are there.
        Without it, a phase is taken to follow the one that ended last before it began. Of the details, `bytes` and
        `seconds_of_cpu` are drawn, and all are kept.
        """
        self._record(name, start, end, after, details)

    def _record(
        self, name: str, start: float, end: float, after: Sequence[str], details: Mapping[str, Any]
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
        """Plain values, ready for JSON. Seconds since the process's start; `ready_after_s` is None until `ready`."""
        phases, counters, ready = self._now()
        return {
            "model": self.model,
            "version": self.version,
            "started_at": self._started_at.isoformat(timespec="milliseconds"),
            "ready_after_s": ready,
            "phases": [_fields(phase) for phase in phases],
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
        return _draw(phases, counters, ready, heading, origin)

    def write(self, folder: Path) -> tuple[Path, Path]:
        """Write cold-start.json and cold-start.svg, each whole or not at all.

        A folder that cannot be written to is a warning in the log: nothing here may keep a server from serving.
        """
        paths = folder / JSON_NAME, folder / SVG_NAME
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _replace(paths[0], json.dumps(self.as_dict(), indent=1, allow_nan=False) + "\n")
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


# --- The picture: columns of fixed width, so that no text can run into another. All numbers are pixels.

WIDTH = 960
NAME_X, NAME_WIDTH = 24, 160
PLOT_X, PLOT_WIDTH = 200, 460
SECONDS_X = 736  # where the seconds end
NOTE_X, NOTE_WIDTH = 756, 180
ROW, BAR = 28, 14
# Colours as they are and no variables: what turns pictures into other formats often knows none.
STYLE = """
text { font-family: system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; font-size: 13px; fill: #1f2328 }
.heading { font-size: 20px; font-weight: 600 } .small { font-size: 12px } .soft { fill: #59636e }
.ground { fill: #fff } .grid { stroke: #d1d9e0 }
.bar { fill: #0969da; fill-opacity: .12; stroke: #0969da } .waited { fill: #0969da }
.failed .bar { fill: #cf222e; stroke: #cf222e } .failed .waited, .bad { fill: #cf222e }
.ready { stroke: #1a7f37; stroke-width: 2 } .on-time { fill: #1a7f37; font-weight: 600 }
@media (prefers-color-scheme: dark) {
text { fill: #e6edf3 } .soft { fill: #9198a1 } .ground { fill: #0d1117 } .grid { stroke: #30363d }
.bar { fill: #4493f8; stroke: #4493f8 } .waited { fill: #4493f8 }
.failed .bar { fill: #f85149; stroke: #f85149 } .failed .waited, .bad { fill: #f85149 }
.ready { stroke: #3fb950 } .on-time { fill: #3fb950 }
}
"""


def _draw(
    phases: Sequence[Phase],
    counters: Mapping[str, int],
    ready: float | None,
    heading: str,
    origin: str,
) -> str:
    path = critical_path(phases, ready)
    first = min([0.0, *(phase.start for phase in phases)])
    last = max([first + 0.001, ready or 0.0, *(phase.end for phase in phases)])

    def x(seconds: float) -> float:
        return PLOT_X + (seconds - first) / (last - first) * PLOT_WIDTH

    outcome = f"READY after {_seconds(ready)}" if ready is not None else "Not READY yet"
    longest = max(path, key=lambda part: part[2] - part[1], default=None)
    if longest:
        name = _fitting(longest[0].name, 400, 13)
        outcome += f"; waited longest for {name}, {_seconds(longest[2] - longest[1])}"
    spoken = "; ".join(
        f"{phase.name}: {_seconds(phase.start)} to {_seconds(phase.end)}{_spoken(phase)}"
        for phase in phases
    )
    top = 132
    bottom = top + ROW * len(phases)
    lines = [
        f"<title>{_xml(heading)}</title>",
        f"<desc>{_xml(outcome)}. {_xml(spoken)}</desc>",
        f"<style>{STYLE}</style>",
        '<rect class="ground" width="100%" height="100%"/>',
        _text(NAME_X, 36, _fitting(heading, WIDTH - 2 * NAME_X, 20), "heading"),
        _text(NAME_X, 58, _fitting(origin, WIDTH - 2 * NAME_X, 13), "soft"),
        _text(NAME_X, 80, outcome),
    ]
    for tick in _ticks(first, last):
        lines.append(f'<path class="grid" d="M{x(tick):.1f} {top - 8}V{bottom}"/>')
        lines.append(_text(x(tick), top - 16, f"{tick:g} s", "soft small", "middle"))
    for number, phase in enumerate(phases):
        waited = [(x(start), x(end)) for part, start, end in path if part is phase]
        lines += _row(phase, top + ROW * number, x(phase.start), x(phase.end), waited)
    if ready is not None:
        anchor, offset = ("end", -6) if x(ready) > PLOT_X + PLOT_WIDTH / 2 else ("start", 6)
        lines.append(f'<path class="ready" d="M{x(ready):.1f} {top - 8}V{bottom + 20}"/>')
        words = f"READY {_seconds(ready)}"
        lines.append(_text(x(ready) + offset, bottom + 18, words, "on-time", anchor))
    y = bottom + 48
    lines += _legend(y)
    for number, (name, amount) in enumerate(sorted(counters.items())):
        column, row = number % 4, number // 4
        words = _fitting(f"{amount:,} {name}", 220, 13)
        lines.append(_text(NAME_X + column * 230, y + 28 + row * 22, words, "soft"))
    height = y + 24 + (math.ceil(len(counters) / 4) * 22 if counters else 0)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}"'
        ' role="img">\n' + "\n".join(lines) + "\n</svg>\n"
    )


def _row(
    phase: Phase, y: float, left: float, right: float, waited: list[tuple[float, float]]
) -> list[str]:
    """A phase's name, its bar, its seconds and a note, and all its details for whoever points at it."""
    failed = bool(phase.details.get("failed"))
    all_details = ", ".join(f"{key} {value}" for key, value in phase.details.items())
    hint = f"{phase.name}: {_seconds(phase.start)} to {_seconds(phase.end)}"
    note = "failed" if failed else _note(phase)
    base = y + BAR - 2
    return [
        f'<g class="failed"><title>{_xml(hint)}' if failed else f"<g><title>{_xml(hint)}",
        f"{_xml('; ' + all_details if all_details else '')}</title>",
        _text(NAME_X, base, _fitting(phase.name, NAME_WIDTH, 13)),
        # Half a pixel in, so that the outline is sharp; two wide at least, so that it is seen.
        f'<rect class="bar" x="{left:.1f}" y="{y + 0.5}" width="{max(2, right - left):.1f}" height="{BAR}" rx="2"/>',
        *(
            f'<rect class="waited" x="{a:.1f}" y="{y + 0.5}" width="{max(2, b - a):.1f}" height="{BAR}" rx="2"/>'
            for a, b in waited
        ),
        _text(SECONDS_X, base, _seconds(phase.seconds), "", "end"),
        _text(
            NOTE_X, base, _fitting(note, NOTE_WIDTH, 12), "bad small" if failed else "soft small"
        ),
        "</g>",
    ]


def _legend(y: float) -> list[str]:
    return [
        f'<rect class="waited" x="{PLOT_X}" y="{y - 11}" width="24" height="12" rx="2"/>',
        _text(PLOT_X + 32, y, "READY waited for this", "soft small"),
        f'<rect class="bar" x="{PLOT_X + 190}" y="{y - 10.5}" width="24" height="12" rx="2"/>',
        _text(PLOT_X + 222, y, "ran meanwhile", "soft small"),
    ]


def _note(phase: Phase) -> str:
    count, cpu = phase.details.get("bytes"), phase.details.get("seconds_of_cpu")
    if isinstance(count, int | float):
        if phase.seconds < 0.001:
            return _bytes(count)
        rate = count / phase.seconds
        return f"{_bytes(count)} at " + (
            f"{rate / 1e9:.2f} GB/s" if rate >= 1e7 else f"{_bytes(rate)}/s"
        )
    return f"{_seconds(cpu)} of CPU" if isinstance(cpu, int | float) else ""


def _spoken(phase: Phase) -> str:
    note = "failed" if phase.details.get("failed") else _note(phase)
    return f", {note}" if note else ""


def _ticks(first: float, last: float) -> list[float]:
    """Round numbers of seconds between the two, at most seven."""
    rough = (last - first) / 6
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
    return [
        round(number * step, 9)
        for number in range(math.ceil(first / step), math.floor(last / step) + 1)
    ]


def _seconds(seconds: float) -> str:
    digits = 3 if abs(seconds) < 0.1 else 2 if abs(seconds) < 100 else 1
    return f"{seconds:,.{digits}f} s"


def _bytes(count: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.2f} {unit}" if unit == "GB" else f"{count / size:.0f} {unit}"
    return f"{count:.0f} B"


def _text(x: float, y: float, words: str, kind: str = "", anchor: str = "") -> str:
    attributes = f' class="{kind}"' if kind else ""
    attributes += f' text-anchor="{anchor}"' if anchor else ""
    return f'<text x="{x:.1f}" y="{y:.1f}"{attributes}>{_xml(words)}</text>'


def _xml(words: str) -> str:
    """The words for XML, without the characters that it, or a reader's eyes, cannot take: control and format."""
    shown = (" " if char in "\n\t" else char for char in words)
    return escape("".join("\ufffd" if unicodedata.category(c)[0] == "C" else c for c in shown))


def _fitting(words: str, width: float, size: float) -> str:
    """The words, cut with an ellipsis where they could be wider than `width` in the widest usual font."""
    room = width / size
    for index, character in enumerate(words):
        wide = unicodedata.east_asian_width(character) in "WF"
        room -= 1.05 if wide or character in "mwMW@%" else 0.8 if character.isupper() else 0.62
        if room < 0:
            return words[: max(0, index - 1)].rstrip() + "…"
    return words
