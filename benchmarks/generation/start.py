"""From the start of a process to its first image, the model in a folder on this machine's disk.

This engine stands here three times: as it is without compiled code, with code that was published before, and compiling.
"""

from __future__ import annotations

import random
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from benchmarks.generation.contestant import Contestant
from benchmarks.generation.published import publish
from benchmarks.generation.rounds import SEED, Contest
from benchmarks.generation.ways import COMPILING, OURS, PUBLISHED, UNCOMPILED, NotHereError
from benchmarks.wire.measure import WARM_TIMES, progress
from benchmarks.wire.memory import warm_free_memory


def run(contest: Contest, size: int, rounds: int, model_bytes: int) -> dict[str, Any]:
    """Every way once a round in a new order, after one round that is not counted (bytecode, page cache)."""
    with ExitStack() as exits:
        skipped: dict[str, str] = {}
        about = None
        if OURS in contest.jobs:
            contest = in_three_ways(contest)
            try:
                published = publish(contest.jobs[PUBLISHED], exits)
            except NotHereError as reason:
                _skip(PUBLISHED, reason, skipped)
            else:
                about = dict(published.about)
                jobs = {**contest.jobs, PUBLISHED: published.job}
                contest = Contest(jobs, contest.ways)
        found = measure(contest, size, rounds, model_bytes, skipped)
        return {
            "size": size,
            "names": contest.titles(),
            "ways": dict(contest.ways),
            "found": found,
            "skipped": skipped,
            "published": about,
        }


def in_three_ways(contest: Contest) -> Contest:
    """With this engine's three starts in the place of the plain one, which would be one of them."""
    plain = contest.jobs[OURS]
    jobs = {
        UNCOMPILED: replace(plain, settings={"COMPILE": "off"}),
        PUBLISHED: plain,
        COMPILING: replace(plain, settings={"COMPILE": "on"}),
    }
    ways = dict.fromkeys(jobs, OURS)
    others = [name for name in contest.jobs if name != OURS]
    return Contest(
        jobs | {name: contest.jobs[name] for name in others},
        ways | {name: contest.ways[name] for name in others},
    )


def measure(
    contest: Contest, size: int, rounds: int, model_bytes: int, skipped: dict[str, str]
) -> dict[str, list[dict[str, float]]]:
    """What was found of each. Whoever fails in one round is asked no more, and nothing of it is told."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in contest.jobs}
    order = random.Random(SEED)
    for number in range(rounds + 1):
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
    warm_free_memory(WARM_TIMES * model_bytes)
    with Contestant(contest.ways[name], contest.jobs[name]) as contestant:
        answer = contestant.ask("one", prompt="the first of all", seed=1, size=size)
        if name in (PUBLISHED, COMPILING):
            used = contestant.ask("compiled")
            if not runs_compiled(name, size, used):
                raise NotHereError(
                    f"{used['found']} graphs were taken from artifacts and {used['made']} compiled, and "
                    f"{size}x{size} is {'' if [size, size] in used['sizes'] else 'not '}compiled. "
                    f"{contestant.last_words() or 'It gave no warning'}"
                )
        return {
            "ready": contestant.ready - contestant.started,
            "image": answer["finished"] - contestant.started,
        }


def runs_compiled(name: str, size: int, used: dict[str, Any]) -> bool:
    """Whether a start was what it is called: code for all of that size, found or made as the name says."""
    if [size, size] not in used["sizes"]:
        return False
    if name == PUBLISHED:
        return bool(used["found"] and not used["made"])
    return bool(used["made"])
