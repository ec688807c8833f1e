"""From the start of a process to its first image, the model in a folder on this machine's disk."""

from __future__ import annotations

import random
from typing import Any

from benchmarks.generation.contestant import Contestant
from benchmarks.generation.rounds import SEED, Contest
from benchmarks.generation.ways import NotHereError
from benchmarks.wire.measure import WARM_TIMES, progress
from benchmarks.wire.memory import warm_free_memory


def run(contest: Contest, size: int, rounds: int, model_bytes: int) -> dict[str, Any]:
    """Every way once a round in a new order, after one round that is not counted (bytecode, page cache)."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in contest.jobs}
    skipped: dict[str, str] = {}
    order = random.Random(SEED)
    for number in range(rounds + 1):
        for name in order.sample(sorted(found), len(found)):
            if name in skipped:
                continue
            try:
                one = _start(contest, name, size, model_bytes)
            except NotHereError as reason:
                skipped[name] = str(reason)
                progress(f"[start] {name}: skipped, {reason}")
                continue
            if number:
                found[name].append(one)
            where = f"round {number} of {rounds}" if number else "not counted"
            progress(
                f"[start, {where}] {name}: ready {one['ready']:.2f} s, image {one['image']:.2f} s"
            )
    return {"size": size, "found": found, "skipped": skipped}


def _start(contest: Contest, name: str, size: int, model_bytes: int) -> dict[str, float]:
    warm_free_memory(WARM_TIMES * model_bytes)
    with Contestant(contest.ways[name], contest.jobs[name]) as contestant:
        answer = contestant.ask("one", prompt="the first of all", seed=1, size=size)
        return {
            "ready": contestant.ready - contestant.started,
            "image": answer["finished"] - contestant.started,
        }
