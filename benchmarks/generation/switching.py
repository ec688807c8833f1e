"""What it takes an engine that serves two models to turn from one to the other: requests for both, in turns."""

from __future__ import annotations

from typing import Any

from benchmarks.generation.contestant import Contestant
from benchmarks.generation.model import Job
from benchmarks.generation.ways import OURS, NotHereError
from benchmarks.wire.measure import progress


def run(job: Job, size: int, rounds: int) -> dict[str, Any]:
    """Seconds of requests for the same model as before and for the other; the first turns are not counted."""
    try:
        with Contestant(OURS, job) as ours:
            ours.ask("one", prompt="warm-up", seed=0, size=size)
            ours.ask("settle")
            found = ours.ask("switch", size=size, rounds=rounds)
    except NotHereError as reason:
        progress(f"[switching] skipped, {reason}")
        return {"skipped": str(reason)}
    return {"size": size, "found": found}
