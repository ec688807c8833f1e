"""What a cold start was like, read out of its `cold-start.json` (weights/waterfall.py writes it) for whoever counts.

The file comes from another process, perhaps of another release: what is missing or no number is left out, and
nothing in it can make reading fail.
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

READS = (
    "requests",
    "retries",
    "stalls",
    "throttled",
    "corrupt_chunks",
    "hedges",
    "hedges_won",
)
SOURCES = ("network", "cache", "folder")
MOST_PHASES = 32
LONGEST_LABEL = 128


@dataclass(frozen=True)
class StartFacts:
    """Seconds, bytes and counts of one start. What is None or missing was not told."""

    model: str = ""
    version: str = ""
    started_at: float | None = None
    """In seconds since 1970."""
    ready_after_s: float | None = None
    phases: Mapping[str, float] = field(default_factory=dict)
    """How long each took, summed where one came twice."""
    waited: Mapping[str, float] = field(default_factory=dict)
    """The part of it for which READY waited."""
    weights_bytes: float | None = None
    weights_seconds: float | None = None
    bytes_from: Mapping[str, float] = field(default_factory=dict)
    """By source, one of SOURCES; those from the network include what had to be read again."""
    reads: Mapping[str, float] = field(default_factory=dict)
    """How often something happened while weights were read, by one of READS."""
    connections: float | None = None

    @property
    def bytes_per_second(self) -> float | None:
        if not self.weights_bytes or not self.weights_seconds:
            return None
        return self.weights_bytes / self.weights_seconds


def read_start(document: object) -> StartFacts:
    """The facts in a document as it was read from JSON, whatever that holds."""
    if not isinstance(document, Mapping):
        return StartFacts()
    phases: defaultdict[str, float] = defaultdict(float)
    weights_bytes = weights_seconds = None
    for name, seconds, phase in _spans(document.get("phases")):
        phases[name] += seconds
        if name == "bytes":
            weights_bytes, weights_seconds = amount(phase.get("bytes")), seconds
    waited: defaultdict[str, float] = defaultdict(float)
    for name, seconds, _ in _spans(document.get("critical_path")):
        waited[name] += seconds
    counters = document.get("counters")
    counters = counters if isinstance(counters, Mapping) else {}
    return StartFacts(
        model=label(document.get("model")),
        version=label(document.get("version")),
        started_at=_timestamp(document.get("started_at")),
        ready_after_s=amount(document.get("ready_after_s")),
        phases=dict(phases),
        waited=dict(waited),
        weights_bytes=weights_bytes,
        weights_seconds=weights_seconds,
        bytes_from=_amounts(counters, {source: f"{source}_bytes" for source in SOURCES}),
        reads=_amounts(counters, {name: name for name in READS}),
        connections=amount(counters.get("connections")),
    )


def amount(value: object) -> float | None:
    """The value as a number that can be counted with: finite and not negative; None for everything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:  # JSON has integers of any length
        return None
    return number if math.isfinite(number) and number >= 0 else None


def _spans(listed: object) -> Iterator[tuple[str, float, Mapping[str, Any]]]:
    """Name and seconds of each entry that has both; a name is a label's value, so there is a limit to both."""
    names: set[str] = set()
    for entry in listed if isinstance(listed, list) else []:
        if not isinstance(entry, Mapping) or entry.get("in_progress"):
            continue  # what goes on has no length yet
        name = label(entry.get("name"))
        start, end = amount(entry.get("start_s")), amount(entry.get("end_s"))
        if not name or start is None or end is None or end < start:
            continue
        names.add(name)
        if len(names) > MOST_PHASES:
            return
        yield name, end - start, entry


def _amounts(counters: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, float]:
    told = {called: amount(counters.get(name)) for called, name in names.items()}
    return {called: value for called, value in told.items() if value is not None}


def label(value: object) -> str:
    """A text that fits a label: not long, and without half characters, which JSON can spell and UTF-8 cannot."""
    if not isinstance(value, str):
        return ""
    return value[:LONGEST_LABEL].encode("utf-8", "replace").decode("utf-8")


def _timestamp(value: object) -> float | None:
    try:
        return datetime.fromisoformat(value).timestamp() if isinstance(value, str) else None
    except (ValueError, OverflowError):
        return None
