"""The parts that all ways take part in, measured one at a time: each prepared before it, or all at the start."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.generation import rounds, switching
from benchmarks.generation.contestant import Contestant, begin
from benchmarks.generation.model import Job
from benchmarks.generation.published import Publishing
from benchmarks.generation.rounds import Contest, Field
from benchmarks.generation.start import Starts
from benchmarks.generation.switching import Switching
from benchmarks.generation.ways import OURS
from benchmarks.wire.measure import progress

Measured = Iterator[tuple[str, dict[str, Any]]]
"""Every part's name and what was measured, as it is done."""

OF_THE_CONTEST = frozenset({"single", "throughput"})


@dataclass(frozen=True)
class Plan:
    """Which parts, by whom, on what and how often. The job's folder has been written."""

    parts: Sequence[str]
    job: Job
    contest: Contest
    starts: Contest
    sizes: Sequence[int]
    rounds: int
    throughput_rounds: int
    start_rounds: int
    concurrency: Sequence[int]
    model_bytes: int
    scratch: Path


def one_after_another(plan: Plan) -> Measured:
    """Every part prepared and measured before the next one is begun."""
    if OF_THE_CONTEST & set(plan.parts):
        with rounds.ready(plan.contest, plan.sizes) as found:
            yield from _contest(plan, found)
    if "start" in plan.parts:
        with ExitStack() as exits:
            starts = Starts(plan.starts)
            if publishing := starts.publish(exits):
                starts.take(publishing)
            yield "start", _start(plan, starts)
    if "switching" in plan.parts:
        found_of = switching.run(plan.job, max(plan.sizes), plan.rounds)
        yield "switching", {"bytes": plan.model_bytes} | found_of


def side_by_side(plan: Plan) -> Measured:
    """Everything prepared at once, and nothing measured before the last of it is done: then the machine is quiet.

    Every process but those of the cold starts is started by this thread, and the others only wait for what these say:
    so whatever ends this block knows all that there is to be ended.
    """
    began = time.monotonic()
    with ExitStack() as exits:
        with ExitStack() as contestants:
            found, starts, two_models = Field(), Starts(plan.starts), None
            processes: list[Contestant | Publishing] = []
            works: list[Callable[[], None]] = []

            def start(way: str, job: Job) -> Contestant:
                contestant = begin(way, job, contestants)
                processes.append(contestant)
                return contestant

            if OF_THE_CONTEST & set(plan.parts):
                for name, job in plan.contest.jobs.items():
                    found.running[name] = start(plan.contest.ways[name], job)
                    works.append(partial(found.warm, name, plan.sizes))
            if "switching" in plan.parts:
                two_models = Switching(start(OURS, plan.job), max(plan.sizes))
                works.append(two_models.prepare)
            if "start" in plan.parts and (publishing := starts.publish(exits)):
                processes.append(publishing)
                works.append(partial(starts.take, publishing))
            _at_once(works, processes)
            progress(f"all that can be had is ready after {time.monotonic() - began:.0f} s")
            yield from _contest(plan, found)
            if two_models:
                measured = two_models.measure(plan.rounds)
                yield "switching", {"bytes": plan.model_bytes} | measured
        # All of them have ended, and given back the device's memory and the host's.
        if "start" in plan.parts:
            yield "start", _start(plan, starts, warm=bool(OF_THE_CONTEST & set(plan.parts)))


def _at_once(
    works: Sequence[Callable[[], None]], processes: Sequence[Contestant | Publishing]
) -> None:
    """Do all in threads. On the way out of an interruption every process is killed, so that no thread waits on."""
    with ThreadPoolExecutor(max(1, len(works))) as threads:
        try:
            for done in as_completed([threads.submit(work) for work in works]):
                done.result()
        except BaseException:
            for process in processes:
                process.kill()
            raise


def _contest(plan: Plan, found: Field) -> Measured:
    contest = plan.contest
    named = {"names": contest.titles(), "ways": dict(contest.ways), "bytes": plan.model_bytes}
    if "single" in plan.parts:
        one = rounds.single(contest, found, plan.sizes, plan.rounds, plan.scratch)
        yield "single", named | one
    if "throughput" in plan.parts:
        count = plan.throughput_rounds
        many = rounds.throughput(contest, found, plan.sizes, count, plan.concurrency)
        yield "throughput", named | many | {"rounds": count}


def _start(plan: Plan, starts: Starts, *, warm: bool = False) -> dict[str, Any]:
    count = plan.start_rounds
    measured = starts.measure(max(plan.sizes), count, plan.model_bytes, warm=warm)
    return {"bytes": plan.model_bytes} | measured | {"rounds": count}
