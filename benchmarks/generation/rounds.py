"""One generation and many, of all ways at once: every round asks all of them the same in a new order."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.generation.contestant import Contestant, begin
from benchmarks.generation.model import Job
from benchmarks.generation.ways import OURS, STOCK, WAYS, NotHereError
from benchmarks.wire.measure import progress

SEED = 20261126
WARM_UPS = 2
ENCODED_EDGE = 1024  # what most people ask for, whatever size is measured
FEWEST_IMAGES = 8


@dataclass(frozen=True)
class Contest:
    """A job for each contestant by name: our engine may stand in it several times, with other settings."""

    jobs: Mapping[str, Job]
    ways: Mapping[str, str]  # a contestant's way, as `WAYS` has it

    def titles(self) -> dict[str, str]:
        """What the page calls each contestant."""
        own = {name: WAYS[way].name for name, way in self.ways.items()}
        return {name: one if name in WAYS else f"{one}, {name}" for name, one in own.items()}


@dataclass
class Field:
    """Those that run, and why the others do not."""

    running: dict[str, Contestant] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    def ask(self, name: str, question: str, **arguments: Any) -> dict[str, Any] | None:
        """None from one that has failed, now or before; it is asked no more."""
        if name in self.skipped:
            return None
        try:
            return self.running[name].ask(question, **arguments)
        except NotHereError as reason:
            self._skip(name, reason)
            return None

    def warm(self, name: str, sizes: Sequence[int]) -> None:
        """Wait until it is ready, and has made images of every size. One that fails is skipped."""
        contestant = self.running[name]
        try:
            contestant.wait_until_ready()
        except NotHereError as reason:
            self._skip(name, reason)
            return
        for size in sizes:
            for number in range(WARM_UPS):
                self.ask(name, "one", prompt=f"warm-up {number}", seed=number, size=size)
        self.ask(name, "settle")
        if name not in self.skipped:
            progress(f"{name}: ready and warm after {time.monotonic() - contestant.started:.0f} s")

    def _skip(self, name: str, reason: NotHereError) -> None:
        self.skipped[name] = str(reason)
        progress(f"{name}: skipped, {reason}")


@contextmanager
def ready(contest: Contest, sizes: Sequence[int]) -> Iterator[Field]:
    """All contestants, one started after the other, each with every size warm."""
    found = Field()
    with ExitStack() as stack:
        for name, job in contest.jobs.items():
            found.running[name] = begin(contest.ways[name], job, stack)
            found.warm(name, sizes)
        yield found


def single(
    contest: Contest, found: Field, sizes: Sequence[int], rounds: int, scratch: Path
) -> dict[str, Any]:
    """One generation after another. `again` is the same prompt with another seed, right after the first."""
    order = random.Random(SEED)
    sizes_found: dict[str, dict[str, Any]] = {}
    for size in sizes:
        edges = sorted({size, ENCODED_EDGE})
        results: dict[str, dict[str, list[Any]]] = {
            name: {"first": [], "again": [], "psnr": []} for name in contest.jobs
        }
        for number in range(rounds):
            pictures: dict[str, Path] = {}
            for name in order.sample(sorted(results), len(results)):
                asked = {"prompt": f"a golden fox in the snow, number {number}", "size": size}
                picture = scratch / f"{len(pictures)}.png"
                first = found.ask(
                    name,
                    "one",
                    seed=number,
                    save=str(picture),
                    encode=edges if contest.ways[name] == OURS else None,
                    **asked,
                )
                again = found.ask(name, "one", seed=number + rounds, **asked)
                if first and again:
                    pictures[name] = picture
                    results[name]["first"].append(first)
                    results[name]["again"].append(again)
            _compare(pictures, results)
            _progress(f"{size}x{size}, round {number + 1} of {rounds}", results)
        sizes_found[str(size)] = results
    memory = {name: found.ask(name, "memory") for name in contest.jobs}
    return {"sizes": sizes_found, "skipped": dict(found.skipped), "memory": memory}


def _progress(where: str, results: Mapping[str, Mapping[str, list[Any]]]) -> None:
    last = {
        name: result["first"][-1]["seconds"] for name, result in results.items() if result["first"]
    }
    progress(f"[{where}] " + ", ".join(f"{name} {seconds:.3f} s" for name, seconds in last.items()))


def _compare(pictures: Mapping[str, Path], results: Mapping[str, dict[str, list[Any]]]) -> None:
    """Note how near each picture is to stock's: PSNR in dB, None where every pixel is the same."""
    import numpy as np
    from PIL import Image

    if STOCK not in pictures:
        return
    pixels = {name: np.asarray(Image.open(path), np.float64) for name, path in pictures.items()}
    for name, own in pixels.items():
        error = float(np.mean((own - pixels[STOCK]) ** 2))
        results[name]["psnr"].append(10 * math.log10(255**2 / error) if error else None)


def throughput(
    contest: Contest,
    found: Field,
    sizes: Sequence[int],
    rounds: int,
    concurrencies: Sequence[int],
) -> dict[str, Any]:
    """Images by 1 to many callers at once. Stock pipelines serve one caller at a time, so they are asked for that.

    On a CPU a round before the first is not counted: the engine tries every number of images that share a pass once.
    """
    order = random.Random(SEED)
    lines = [
        (name, concurrency)
        for name in contest.jobs
        for concurrency in (concurrencies if contest.ways[name] == OURS else [1])
    ]
    sizes_found: dict[str, dict[str, dict[str, Any]]] = {}
    seed = 1000
    for size in sizes:
        measured: dict[str, dict[str, Any]] = {name: {} for name in contest.jobs}
        on_cpu = any(job.device == "cpu" for job in contest.jobs.values())
        for number in range(0 if on_cpu else 1, rounds + 1):
            for name, concurrency in order.sample(lines, len(lines)):
                images = max(FEWEST_IMAGES, 2 * concurrency)
                asked = {"size": size, "concurrency": concurrency, "images": images, "seed": seed}
                seed += images
                answer = found.ask(name, "many", **asked)
                if answer and number:
                    rate = images / answer["seconds"]
                    entry = {"rate": rate, "busy": answer["device_seconds"] / answer["seconds"]}
                    measured[name].setdefault(str(concurrency), []).append(entry)
            progress(f"[{size}x{size}, many, round {number} of {rounds} done]")
        sizes_found[str(size)] = measured
    memory = {name: found.ask(name, "memory") for name in contest.jobs}
    return {"sizes": sizes_found, "skipped": dict(found.skipped), "memory": memory}
