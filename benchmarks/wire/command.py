"""The command line of benchmarks/weights.py: which parts are run, on what, and where the results go."""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.wire import cold, peak, replicas, transports
from benchmarks.wire.machine import machine, versions
from benchmarks.wire.measure import progress
from benchmarks.wire.memory import ROOT
from benchmarks.wire.model import (
    BUCKET,
    Published,
    publish_random_model,
    publish_small_sdxl,
    write_tensorizer_copy,
)
from benchmarks.wire.nginx import NginxError, Server, missing_programs, serve
from benchmarks.wire.report import write
from benchmarks.wire.target import Target

RESULTS = ROOT / "benchmarks" / "results" / "weights.md"
RAM_DISK = Path("/dev/shm")  # noqa: S108 - a private folder is made in it
WIRES: tuple[transports.Wire, ...] = ("free", "limited", "tls")
PARTS = (*WIRES, "replicas", "memory", "cold")
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def main(description: str | None) -> int:
    """Measure what the command line asks for; returns the exit status."""
    options = _options(description)
    missing = missing_programs()
    if missing:
        names = " and ".join(missing)
        print(
            f"{names} must be installed. On Debian and Ubuntu: sudo apt-get install {' '.join(missing)}; "
            f"on a Mac: brew install {' '.join(missing)}",
            file=sys.stderr,
        )
        return 2
    signal.signal(
        signal.SIGTERM, lambda *_: sys.exit(143)
    )  # so that nginx is stopped on the way out
    data = options.output.with_suffix(".json")
    parts: dict[str, Any] = json.loads(data.read_text()) if data.exists() else {}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    try:
        for name, part in _run(options):
            parts[name] = {
                "date": f"{datetime.now(UTC):%Y-%m-%d}",
                "machine": machine(),
                "versions": versions(),
                "rounds": options.rounds,
                **part,
            }
            # After every part: hours of measuring must not hang on the last one.
            data.write_text(json.dumps(parts, indent=1) + "\n")
            written = write(parts, options.output, data.name)
    except NginxError as error:
        print(error, file=sys.stderr)
        return 2
    print(options.output.read_text())
    progress("written: " + ", ".join(str(file) for file in [*written, data]))
    return 0


def _run(options: argparse.Namespace) -> Any:
    """Yield every part's name and what was measured, as it is done."""
    with ExitStack() as stack:
        folder = tempfile.mkdtemp(prefix="bench-", dir=RAM_DISK if RAM_DISK.is_dir() else None)
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        root, nginx = Path(folder) / "buckets", Path(folder) / "nginx"
        root.mkdir()
        server = stack.enter_context(serve(root, nginx))
        todo = [name for name in PARTS if name in options.parts]
        if set(todo) - {"cold"}:
            progress(f"making a model of {options.size / 1e9:.2f} GB …")
            published = publish_random_model(root, options.size)
            if set(todo) & set(WIRES):
                progress("making Tensorizer's copy of it …")
                copy = write_tensorizer_copy(root, published)
                for wire in WIRES:
                    if wire in todo:
                        target = _target(published, server, wire, folder, copy)
                        yield (
                            wire,
                            transports.run(wire, target, options.connections, options.rounds),
                        )
                if copy:
                    (root / BUCKET / copy).unlink()
            if "replicas" in todo:
                target = _target(published, server, "counted", folder)
                yield "replicas", replicas.run(server, target, options.replicas, options.rounds)
            if "memory" in todo:
                yield "memory", peak.run(_target(published, server, "free", folder), options.rounds)
            shutil.rmtree(root / BUCKET / published.model_path)
        if "cold" in todo:
            progress(f"making a real SDXL of about {options.size / 1e9:.2f} GB …")
            published = publish_small_sdxl(root, options.size)
            target = _target(published, server, "limited", folder)
            yield "cold", cold.run(target, root / BUCKET, options.rounds)


def _target(
    published: Published, server: Server, wire: str, folder: str, copy: str | None = None
) -> Target:
    return Target(
        endpoint=getattr(server, wire),
        bucket=published.bucket,
        model_path=published.model_path,
        version=published.version,
        weights=published.weights,
        others=published.others,
        tensor_bytes=published.tensor_bytes,
        scratch=os.path.join(folder, "scratch"),  # noqa: PTH118 - it travels as text
        certificate=server.certificate if wire == "tls" else None,
        tensorizer_key=copy,
    )


def _options(description: str | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmarks/weights.py",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--parts",
        type=_list_of(_part),
        default=list(PARTS),
        help=f"some of {','.join(PARTS)} (default: all)",
    )
    parser.add_argument(
        "--rounds", type=_count, default=5, help="timed rounds (default: %(default)s)"
    )
    parser.add_argument(
        "--size",
        type=_size,
        default="2GB",
        help="of the model; memory for eight of it is used (default: %(default)s)",
    )
    parser.add_argument(
        "--connections",
        type=_list_of(_count),
        default=[4, 8, 16, 32],
        help="where raw sockets and this loader are compared on the limited wire (default: 4,8,16,32)",
    )
    parser.add_argument(
        "--replicas", type=_count, default=8, help="how many at once (default: %(default)s)"
    )
    parser.add_argument("--output", type=Path, default=RESULTS, help="default: %(default)s")
    return parser.parse_args()


def _list_of(parse: Callable[[str], Any]) -> Callable[[str], Sequence[Any]]:
    return lambda text: [parse(piece) for piece in text.split(",")]


def _part(text: str) -> str:
    if text not in PARTS:
        raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(PARTS)}")
    return text


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a count")
    return int(text)


def _size(text: str) -> int:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]I?B)", text.upper())
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 2GB or 256MB")
    return int(float(found[1]) * UNITS[found[2]])
