"""From the start of a process to its first image, the model in a folder on this machine's disk.

This engine stands here three times: as it is without compiled code, with code that was published before, and compiling.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

from benchmarks.generation.contestant import Contestant
from benchmarks.generation.model import Job
from benchmarks.generation.published import Publishing, publish
from benchmarks.generation.rounds import SEED, Contest
from benchmarks.generation.ways import COMPILING, OURS, PUBLISHED, UNCOMPILED, WAYS, NotHereError
from benchmarks.wire.measure import WARM_TIMES, progress
from benchmarks.wire.memory import warm_free_memory

OWN = {"uncompiled": UNCOMPILED, "published": PUBLISHED, "compiling": COMPILING}
"""What the command line calls this engine's own starts."""


@dataclass
class Starts:
    """Who starts, why others do not, and what the published code is once there is any."""

    contest: Contest
    skipped: dict[str, str] = field(default_factory=dict)
    about: Mapping[str, Any] | None = None

    def publish(self, exits: ExitStack) -> Publishing | None:
        """Begin to compile and publish, if anybody starts with that; `take` waits for it."""
        if PUBLISHED not in self.contest.jobs:
            return None
        try:
            return publish(self.contest.jobs[PUBLISHED], exits)
        except NotHereError as reason:
            _skip(PUBLISHED, reason, self.skipped)
            return None

    def take(self, publishing: Publishing) -> None:
        """Start with that code from now on, or not at all where there is none."""
        try:
            published = publishing.published()
        except NotHereError as reason:
            _skip(PUBLISHED, reason, self.skipped)
            return
        self.about = published.about
        jobs = {**self.contest.jobs, PUBLISHED: published.job}
        self.contest = Contest(jobs, self.contest.ways)

    def measure(
        self, size: int, rounds: int, model_bytes: int, *, warm: bool = False
    ) -> dict[str, Any]:
        """Every way once a round in a new order.

        After one round that is not counted, unless bytecode, page cache and free memory are `warm` already.
        """
        found = measure(self.contest, size, rounds, 0 if warm else model_bytes, self.skipped)
        return {
            "size": size,
            "names": self.contest.titles(),
            "ways": dict(self.contest.ways),
            "found": found,
            "skipped": self.skipped,
            "published": self.about,
        }


def starts_of(contest: Contest, job: Job, names: Sequence[str] | None) -> Contest:
    """Who starts: of `names` (a way, or one of `OWN`; `ours` is all of these), or all of the contest.

    Where this engine stands in the contest, if only with other settings, its own starts are there. A variant that
    would be one of them is not started twice.
    """
    own = {
        UNCOMPILED: replace(job, settings={"COMPILE": "off"}),
        PUBLISHED: job,
        COMPILING: replace(job, settings={"COMPILE": "on"}),
    }
    if names is None:
        asked = [*own] if OURS in contest.ways.values() else []
        others = {
            name: way
            for name, way in contest.ways.items()
            if name != OURS and contest.jobs[name] not in (own[UNCOMPILED], own[COMPILING])
        }
    else:
        asked = [name for word, name in OWN.items() if word in names or OURS in names]
        ways = [name for name in names if name in WAYS and name != OURS]
        others = {name: name for name in ways}
    return Contest(
        {name: own[name] for name in asked}
        | {name: contest.jobs.get(name, job) for name in others},
        dict.fromkeys(asked, OURS) | others,
    )


def measure(
    contest: Contest, size: int, rounds: int, model_bytes: int, skipped: dict[str, str]
) -> dict[str, list[dict[str, float]]]:
    """What was found of each. Whoever fails in one round is asked no more, and nothing of it is told.

    With no `model_bytes` there is nothing to warm, and every round counts.
    """
    found: dict[str, list[dict[str, float]]] = {name: [] for name in contest.jobs}
    order = random.Random(SEED)
    for number in range(0 if model_bytes else 1, rounds + 1):
        for name in order.sample(sorted(found), len(found)):
            if name in skipped:
                continue
            try:
                one = _start(contest, name, size, model_bytes)
            except NotHereError as reason:
                found[name].clear()
                _skip(name, reason, skipped)
                continue
            if number:
                found[name].append(one)
            where = f"round {number} of {rounds}" if number else "not counted"
            progress(
                f"[start, {where}] {name}: ready {one['ready']:.2f} s, image {one['image']:.2f} s"
            )
    return found


def _skip(name: str, reason: NotHereError, skipped: dict[str, str]) -> None:
    skipped[name] = str(reason).removesuffix(".")
    progress(f"[start] {name}: skipped, {reason}")


def _start(contest: Contest, name: str, size: int, model_bytes: int) -> dict[str, float]:
    if model_bytes:
        warm_free_memory(WARM_TIMES * model_bytes)
    with Contestant(contest.ways[name], contest.jobs[name]) as contestant:
        answer = contestant.ask("one", prompt="the first of all", seed=1, size=size)
        found = {
            "ready": contestant.ready - contestant.started,
            "image": answer["finished"] - contestant.started,
        }
        if name in (PUBLISHED, COMPILING):
            used = contestant.ask("compiled", size=size)
            found["compiled"] = used["since"] - contestant.started
            if not runs_compiled(name, size, used):
                raise NotHereError(
                    f"{used['found']} graphs were taken from artifacts and {used['made']} compiled, and "
                    f"{size}x{size} is {'' if [size, size] in used['sizes'] else 'not '}compiled. "
                    f"{contestant.last_words() or 'It gave no warning'}"
                )
        return found


def runs_compiled(name: str, size: int, used: dict[str, Any]) -> bool:
    """Whether a start was what it is called: code for all of that size, found or made as the name says."""
    if [size, size] not in used["sizes"]:
        return False
    if name == PUBLISHED:
        return bool(used["found"] and not used["made"])
    return bool(used["made"])
