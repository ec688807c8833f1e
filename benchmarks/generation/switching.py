"""What it takes an engine that serves two models to turn from one to the other: requests for both, in turns."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from benchmarks.generation.contestant import Contestant, begin
from benchmarks.generation.model import Job
from benchmarks.generation.rounds import WARM_UPS
from benchmarks.generation.ways import OURS, NotHereError
from benchmarks.wire.measure import progress


@dataclass
class Switching:
    """This engine, and why it could not be measured if so."""

    ours: Contestant
    size: int
    skipped: str = ""

    def prepare(self) -> None:
        """Have it ready and warm, with a second model beside the first."""
        try:
            self.ours.wait_until_ready()
            for number in range(WARM_UPS):
                self.ours.ask("one", prompt=f"warm-up {number}", seed=number, size=self.size)
            self.ours.ask("settle")
            self.ours.ask("add_second")
            self.ours.ask("settle")
        except NotHereError as reason:
            self._skip(reason)
            return
        progress(f"[switching] two models after {time.monotonic() - self.ours.started:.0f} s")

    def measure(self, rounds: int) -> dict[str, Any]:
        """Seconds of requests for the same model as before and for the other; the first turns are not counted."""
        if not self.skipped:
            try:
                found = self.ours.ask("switch", size=self.size, rounds=rounds)
            except NotHereError as reason:
                self._skip(reason)
            else:
                return {"size": self.size, "found": found}
        return {"skipped": self.skipped}

    def _skip(self, reason: NotHereError) -> None:
        self.skipped = str(reason)
        progress(f"[switching] skipped, {reason}")


def run(job: Job, size: int, rounds: int) -> dict[str, Any]:
    """All of it, from the start of the process to its end."""
    with ExitStack() as stack:
        switching = Switching(begin(OURS, job, stack), size)
        switching.prepare()
        return switching.measure(rounds)
