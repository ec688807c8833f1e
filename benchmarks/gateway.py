"""What the gateway costs: Cog's server asked through it beside Cog's server asked bare, in the same run.

`.venv-bench/bin/python benchmarks/gateway.py` writes benchmarks/results/gateway.md, .json and .svg. Two models: one
whose card is a clock (benchmarks/door/card.py), and the demo's small SDXL on the CPU. The bucket is
benchmarks/door/bucket.py on loopback.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

# As a script this file's own folder would come first, where `weights` is benchmarks/weights.py and not the room.
sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.door import servers  # noqa: E402
from benchmarks.door.callers import Caller, rush  # noqa: E402
from benchmarks.door.measured import put_seconds  # noqa: E402
from benchmarks.door.report import BARE, POST, PUT, chart, report  # noqa: E402
from benchmarks.wire.command import _count  # noqa: E402
from benchmarks.wire.machine import machine, versions_of  # noqa: E402
from benchmarks.wire.measure import SEED, progress  # noqa: E402
from benchmarks.wire.memory import ROOT  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "gateway.md"
PACKAGES = ("cog", "uvicorn", "uvloop", "fastapi", "aiohttp", "boto3")
CARD_SECONDS = 0.11
CALLERS = 64
WARM_UPS = 5
PARTS = ("card", "small")


@contextmanager
def running(
    part: str, bucket: int, folder: Path
) -> Iterator[tuple[servers.Server, servers.Server]]:
    """Cog's server bare, and the gateway before it, both ready."""
    with ExitStack() as exits:
        if part == "card":
            cwd = servers.card_folder(folder / "runner")
            more = {"CARD_SECONDS": str(CARD_SECONDS)}
        else:
            cwd = ROOT
            more = servers.small_model(folder)
        variables = servers.environment(bucket, more)
        gateway = servers.start(cwd, variables, folder, exits)
        servers.wait_until_ready(gateway)
        yield servers.behind(gateway), gateway


def measure(part: str, bucket: int, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of each request of one caller, in turns; predictions a second of many callers, in turns."""
    order = random.Random(SEED)
    with running(part, bucket, folder) as (bare, gateway):
        asked = {BARE: (bare, True), PUT: (gateway, True), POST: (gateway, False)}
        callers = {way: Caller(server.port) for way, (server, _) in asked.items()}
        alone: dict[str, list[float]] = {way: [] for way in asked}
        for number in range(WARM_UPS + options.requests):
            for way in order.sample(sorted(asked), len(asked)):
                seconds = callers[way].ask(given(number), with_id=asked[way][1])
                if number >= WARM_UPS:
                    alone[way].append(seconds)
        progress(f"[{part}] one caller: {options.requests} requests each way")
        many: dict[str, list[dict[str, float]]] = {BARE: [], PUT: []}
        for number in range(options.rounds):
            for way in order.sample(sorted(many), len(many)):
                inputs = [given(each) for each in range(options.predictions)]
                spent = servers.cpu_seconds(gateway)
                found = rush(asked[way][0].port, CALLERS, inputs)
                cost = (servers.cpu_seconds(gateway) - spent) / options.predictions
                many[way].append({"rate": found.rate, "refused": found.refused, "cpu": cost})
                progress(f"[{part}, round {number + 1}] {way}: {found.rate:.2f} a second")
    return {"alone": alone, "many": many}


def given(number: int) -> dict[str, Any]:
    return {"prompt": f"a lighthouse in a storm, number {number}", "seed": number}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", default=",".join(PARTS), help="default: %(default)s")
    parser.add_argument("--requests", type=_count, default=200, help="default: %(default)s")
    parser.add_argument("--predictions", type=_count, default=128, help="default: %(default)s")
    parser.add_argument("--rounds", type=_count, default=6, help="default: %(default)s")
    parser.add_argument("--output", type=Path, default=RESULTS, help="default: %(default)s")
    options = parser.parse_args()
    load = os.getloadavg()[0]
    with servers.bucket() as bucket:
        puts = put_seconds(bucket)
        parts = {}
        for part in options.parts.split(","):
            with tempfile.TemporaryDirectory(prefix="bench-") as folder:
                parts[part] = measure(part, bucket, Path(folder), options)
    found = {
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "machine": machine(),
        "versions": versions_of(PACKAGES),
        "load": load,
        "arguments": f"--parts {options.parts} --requests {options.requests} "
        f"--predictions {options.predictions} --rounds {options.rounds}",
        "callers": CALLERS,
        "slots": servers.SLOTS,
        "card_seconds": CARD_SECONDS,
        "put_seconds": puts,
        "parts": parts,
    }
    text = report(found)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(text)
    options.output.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
    options.output.with_suffix(".svg").write_text(chart(found))
    print(text)


if __name__ == "__main__":
    main()
