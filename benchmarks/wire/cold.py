"""Part two: the whole cold start, from the start of a process to an engine ready to generate."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.wire.measure import (
    LONGEST,
    SEED,
    WARM_TIMES,
    Skipped,
    environment,
    progress,
    told_target,
)
from benchmarks.wire.memory import ROOT, warm_free_memory
from benchmarks.wire.target import Target

CONNECTIONS = 4  # at 90 MB/s each: 360 MB/s, for everybody
MODES = {
    "product": "this product: stream, imports and build at once",
    "plain": "download everything, then stock from_pretrained",
    "stream": "the stream alone",
    "build": "imports and build alone, from files in memory",
}
LABELS = {  # for the picture
    "product": "this product",
    "plain": "download, then from_pretrained",
    "stream": "the stream alone",
    "build": "imports and build alone",
}


def run(target: Target, bucket_folder: Path, rounds: int) -> dict[str, Any]:
    """Every mode once a round in a new order, after one round that is not counted (bytecode, page cache)."""
    found: dict[str, list[float]] = {mode: [] for mode in MODES}
    skipped: dict[str, str] = {}
    order = random.Random(SEED)
    for number in range(rounds + 1):
        for mode in order.sample(sorted(MODES), len(MODES)):
            if mode in skipped:
                continue
            try:
                seconds = _measure(mode, target, bucket_folder)
            except Skipped as reason:
                skipped[mode] = str(reason)
                progress(f"[cold] {MODES[mode]}: skipped, {reason}")
                continue
            if number:
                found[mode].append(seconds)
            where = f"round {number} of {rounds}" if number else "not counted"
            progress(f"[cold, {where}] {MODES[mode]}: {seconds:.2f} s")
    return {"bytes": target.file_bytes, "found": found, "skipped": skipped}


def _measure(mode: str, target: Target, bucket_folder: Path) -> float:
    told = environment(target) | {
        "AWS_ENDPOINT_URL_S3": target.endpoint,
        "AWS_REGION": "auto",
        "MODEL_PATH": target.model_path,
        "MODEL_BUCKET_NAME": target.bucket,
        "PUBLIC_BUCKET_NAME": "generated-images",
        "MODEL_READ_CONNECTIONS": str(CONNECTIONS),
        "DEVICE": "cpu",
        "BENCH_FOLDER": str(bucket_folder),
    }
    with told_target(target) as file:
        warm_free_memory(WARM_TIMES * target.file_bytes)
        command = [sys.executable, "-m", "benchmarks.wire.cold_start", mode, str(file)]
        started = time.monotonic()
        try:
            finished = subprocess.run(
                [*command, str(CONNECTIONS)],
                cwd=ROOT,
                env=told,
                check=False,
                capture_output=True,
                text=True,
                timeout=LONGEST,
            )
        except subprocess.TimeoutExpired:
            raise Skipped(f"it took more than {LONGEST:.0f} seconds") from None
    if finished.returncode:
        said = finished.stderr.strip().splitlines()
        raise Skipped(f"it failed: {said[-1] if said else 'without a word'}")
    return float(json.loads(finished.stdout)["ready"]) - started
