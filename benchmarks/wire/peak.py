"""Part four: how much host memory a load takes at its peak, over what the process had after its imports."""

from __future__ import annotations

import statistics
from typing import Any

from benchmarks.wire.measure import Found, Skipped, Way, measure, progress
from benchmarks.wire.target import Target
from benchmarks.wire.transports import FRESH, LOADER, OURS, PEERS

WAYS = (
    Way(OURS, OURS, LOADER),
    Way(f"{OURS}, reading in threads", OURS, LOADER, {"reader": "thread"}),
    Way(f"{OURS}, reading in a process of its own", OURS, LOADER, {"reader": "process"}),
    Way(FRESH, FRESH, f"{PEERS}.raw:prepare", {"connections": 4, "fresh": True}),
    Way("Run:ai Model Streamer", "runai", f"{PEERS}.runai:prepare", {"concurrency": 16}),
    Way(
        "boto3 get_object + readinto",
        "boto3",
        f"{PEERS}.boto:read_into",
        {"connections": 8, "mebibytes": 64},
    ),
    Way(
        "obstore get_range",
        "obstore",
        f"{PEERS}.obstore_ranges:prepare",
        {"connections": 32, "mebibytes": 16},
    ),
)


def run(target: Target, rounds: int) -> dict[str, Any]:
    found = []
    for way in WAYS:
        one = Found(way)
        peaks = []
        for _ in range(rounds):
            try:
                answer = measure(way, target, memory=True)
            except Skipped as reason:
                one.skipped = str(reason)
                progress(f"[memory] {way.name}: skipped, {reason}")
                break
            one.seconds.append(answer["seconds"])
            one.answers.append(answer)
            peaks.append(answer["tree_peak"])
        if peaks:
            progress(f"[memory] {way.name}: {statistics.median(peaks) / 1e6:,.0f} MB")
        found.append({**one.plain(), "peaks": peaks})
    return {"bytes": target.file_bytes, "found": found}
