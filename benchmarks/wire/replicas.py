"""Part three: several replicas on one node that share its cache, and what a warm cache is worth.

Once with as many connections as the cold start has, where the wire is the bound, and once with as many as the loader
chooses, where a few cores soon are: every replica copies and verifies all bytes, whoever fetched them.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.wire.cold import CONNECTIONS
from benchmarks.wire.measure import Skipped, Way, measure, measure_together, progress
from benchmarks.wire.nginx import Server
from benchmarks.wire.target import Target
from benchmarks.wire.transports import LOADER, OURS, PEERS


def run(server: Server, target: Target, count: int, rounds: int) -> dict[str, Any]:
    """`target` is the endpoint that counts what it sends. The cache lies in the system's temporary folder."""
    part: dict[str, Any] = {"bytes": target.file_bytes, "count": count, "found": {}}
    try:
        for number in range(1, rounds + 1):
            for name, connections in (("pinned", CONNECTIONS), ("free", None)):
                found = part["found"].setdefault(name, {})
                for what, value in _round(server, target, count, connections).items():
                    found.setdefault(what, []).append(value)
                said = ", ".join(f"{what} {values[-1]:.2f}" for what, values in found.items())
                progress(f"[replicas, {name}, round {number} of {rounds}] {said}")
    except Skipped as reason:
        progress(f"[replicas] skipped, {reason}")
        part["skipped"] = str(reason)
    return part


def _round(server: Server, target: Target, count: int, connections: int | None) -> dict[str, float]:
    """Seconds, and how many times the model's bytes the server sent ("sent …")."""
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        cached = _cached(Path(folder) / "alone", connections)
        server.forget_sent()
        found["alone"] = measure(cached, target)["seconds"]
        found["sent alone"] = server.sent_bytes() / target.file_bytes
        os.sync()  # or what was just written goes to the disk while it is read
        found["warm cache"] = measure(cached, target)["seconds"]
        plain = Way(
            "readinto",
            "readinto",
            f"{PEERS}.local:prepare",
            {"folder": cached.options["cache_folder"]},
        )
        found["plain readinto"] = measure(plain, target)["seconds"]
    with tempfile.TemporaryDirectory() as folder:
        server.forget_sent()
        way = _cached(Path(folder) / "shared", connections)
        answers = measure_together(way, target, count)
        found["sent together"] = server.sent_bytes() / target.file_bytes
    first = min(answer["started"] for answer in answers)
    found["together, first ready"] = min(answer["finished"] for answer in answers) - first
    found["together, last ready"] = max(answer["finished"] for answer in answers) - first
    return found


def _cached(folder: Path, connections: int | None) -> Way:
    folder.mkdir()
    return Way(OURS, OURS, LOADER, {"cache_folder": str(folder), "connections": connections})
