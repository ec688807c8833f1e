"""Part one: every way of getting the weights into memory, over a free wire, a limited one, and TLS."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from benchmarks.wire.measure import Way, in_rounds
from benchmarks.wire.target import Target

Wire = Literal["free", "limited", "tls"]

RAW = "raw sockets"
FRESH = "raw sockets, into fresh memory"
OURS = "this loader"
UNVERIFIED = "this loader, unverified"
IN_A_PROCESS = "this loader, in a process of its own"
PEERS = "benchmarks.wire.peers"
LOADER = "benchmarks.wire.ours:prepare"
RAW_CONNECTIONS = (2, 4, 8)
CONCURRENCIES = (8, 16, 32)

# What cannot be measured, whatever is installed.
NOT_MEASURED = {
    "fastsafetensors 0.5": "reads local files only (its copiers are POSIX, GPUDirect Storage and 3FS): "
    "neither S3 nor HTTP",
}


def ways(wire: Wire, pins: Sequence[int]) -> list[Way]:
    """`pins` are the numbers of connections at which, on a limited wire, raw sockets and this loader are compared."""
    pinned = wire == "limited"
    found = [
        *_raw(pins if pinned else RAW_CONNECTIONS, pinned=pinned),
        Way(OURS, OURS, LOADER),
        Way(UNVERIFIED, UNVERIFIED, LOADER, {"verify": False}),
    ]
    if wire == "tls":
        found.append(Way(IN_A_PROCESS, IN_A_PROCESS, LOADER, {"reader": "process"}))
    if pinned:
        found += [
            Way(f"{OURS}, {number} connections", OURS, LOADER, {"connections": number}, number)
            for number in pins
        ]
    return found + peers()


def peers() -> list[Way]:
    boto, obstore = f"{PEERS}.boto", f"{PEERS}.obstore_ranges:prepare"
    runai = "Run:ai Model Streamer"
    return [
        *(
            Way(
                f"{runai}, concurrency {number}",
                runai,
                f"{PEERS}.runai:prepare",
                {"concurrency": number},
            )
            for number in CONCURRENCIES
        ),
        Way("boto3 download_file, to a RAM disk", "boto3 download_file", f"{boto}:download"),
        *(
            Way(
                f"boto3 get_object + readinto, {threads} x {size} MiB",
                "boto3 get_object + readinto",
                f"{boto}:read_into",
                {"connections": threads, "mebibytes": size},
            )
            for threads, size in ((8, 64), (32, 32))
        ),
        *(
            Way(
                f"obstore get_range, 32 x {size} MiB",
                "obstore get_range",
                obstore,
                {"connections": 32, "mebibytes": size},
            )
            for size in (16, 32)
        ),
        Way("s5cmd cp, to a RAM disk", "s5cmd cp", f"{PEERS}.s5cmd_copy:prepare"),
        Way("Tensorizer, its own format", "Tensorizer", f"{PEERS}.tensorizer_stream:prepare"),
    ]


def _raw(connections: Sequence[int], *, pinned: bool) -> list[Way]:
    function = f"{PEERS}.raw:prepare"
    return [
        Way(
            f"{family}, {number} connections",
            family,
            function,
            {"connections": number, "fresh": family == FRESH},
            number if pinned else None,
        )
        for family in (RAW, FRESH)
        for number in connections
    ]


def run(wire: Wire, target: Target, pins: Sequence[int], rounds: int) -> dict[str, Any]:
    found = in_rounds(wire, ways(wire, pins), target, rounds)
    return {"bytes": target.file_bytes, "found": [one.plain() for one in found]}
