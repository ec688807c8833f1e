"""Cold starts for the page to draw, as the runner writes them: by the same code, on a clock of their own."""

from __future__ import annotations

from typing import Any

from weights.waterfall import ColdStart

MODEL = "ByteDance/SDXL-Lightning"
VERSION = "8ab4e6ad0f8c5b21c9d1a7a2f6d3c4e5"
TOTAL = 6_938_000_000
BEGAN = 1.0


def loaded() -> dict[str, Any]:
    """One that took 11 seconds."""
    start = _begun()
    start.add("bytes", BEGAN, 9.0, after=["manifest"], bytes=TOTAL)
    start.add("verification", BEGAN, 9.0, after=["manifest"], seconds_of_cpu=3.1)
    start.add("imports", 1.2, 6.0, after=["clients"])
    start.add("build", 6.0, 9.5, after=["imports", "bytes"])
    start.add("warm-up", 9.5, 11.0, after=["build"])
    start.count("requests", 431)
    start.count("retries", 2)
    return start.as_dict() | {"ready_after_s": 11.0}


def loading(read: int) -> dict[str, Any]:
    """One that goes on, with so many bytes read."""
    start = _begun()
    start.begin(
        "bytes", BEGAN, after=["manifest"], so_far=lambda: {"bytes": read, "total_bytes": TOTAL}
    )
    start.add("imports", 1.2, 3.4, after=["clients"])
    start.begin("build", 3.4, after=["imports", "bytes"])
    return _at(start.as_dict(), 1.0 + 8.0 * read / TOTAL)


def failed() -> dict[str, Any]:
    """One that ended while it read."""
    start = _begun()
    start.add("imports", 1.2, 3.4, after=["clients"])
    start.add("bytes", BEGAN, 4.2, after=["manifest"], failed=True)
    return start.as_dict()


def _begun() -> ColdStart:
    start = ColdStart(0.0, model=MODEL, version=VERSION)
    start.add("manifest", 0.3, 1.0)
    start.add("clients", 1.0, 1.2, after=["manifest"])
    return start


def _at(document: dict[str, Any], moment: float) -> dict[str, Any]:
    """The document as if it had been written at that moment, rather than now."""
    for phase in document["phases"]:
        if phase.get("in_progress"):
            phase["end_s"] = moment
    return document
