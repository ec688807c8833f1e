"""The command line of benchmarks/engine.py: which parts are run, by whom, on what, and where the results go."""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import signal
import sys
import tempfile
from collections.abc import Generator
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.generation import overhead
from benchmarks.generation.model import Job, write_model
from benchmarks.generation.plan import Plan, one_after_another, side_by_side
from benchmarks.generation.report import write
from benchmarks.generation.rounds import Contest
from benchmarks.generation.start import OWN, starts_of
from benchmarks.generation.ways import OURS, WAYS, ways_for
from benchmarks.wire.command import _count, _list_of
from benchmarks.wire.machine import machine, versions_of
from benchmarks.wire.measure import progress
from benchmarks.wire.memory import ROOT

RESULTS = ROOT / "benchmarks" / "results"
PARTS = ("single", "throughput", "overhead", "start", "switching")
PACKAGES = (
    "torch",
    "triton",
    "diffusers",
    "transformers",
    "accelerate",
    "openvino",
    "torchao",
    "isal",
    "pillow",
)
SIZES = {"small": [64, 256], "full": [1024]}
DTYPES = ("bfloat16", "float16", "float32")


def main(description: str | None) -> int:
    """Measure what the command line asks for; returns the exit status."""
    options = _options(description)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that children end on the way out
    device, card = _device()
    settings = _settings(options, device)
    output: Path = options.output or RESULTS / f"engine-{_slug(card)}.md"
    output.parent.mkdir(parents=True, exist_ok=True)
    data = output.with_suffix(".json")
    parts: dict[str, Any] = json.loads(data.read_text()) if data.exists() else {}
    # Closed on every way out, so that children end.
    with closing(_run(options, settings)) as measured:
        for name, part in measured:
            parts[name] = {
                "date": f"{datetime.now(UTC):%Y-%m-%d}",
                "machine": f"{card}; {machine()}" if card else machine(),
                "versions": ", ".join(
                    [f"Python {platform.python_version()}", *versions_of(PACKAGES), *_cuda(device)]
                ),
                "command": f"benchmarks/engine.py {' '.join(sys.argv[1:])}".strip(),
                "rounds": options.rounds,
                **settings,
                **part,
            }
            # After every part: an hour of measuring must not hang on the last one.
            data.write_text(json.dumps(parts, indent=1) + "\n")
            written = write(parts, output, data.name)
    print(output.read_text())
    progress("written: " + ", ".join(str(file) for file in [*written, data]))
    return 0


def _run(
    options: argparse.Namespace, settings: dict[str, Any]
) -> Generator[tuple[str, dict[str, Any]]]:
    """Yield every part's name and what was measured, as it is done."""
    if set(options.parts) != {"overhead"}:
        yield from _run_contest(options, settings)
    if "overhead" in options.parts:
        yield "overhead", overhead.run(options.overhead_size, options.rounds)


def _run_contest(
    options: argparse.Namespace, settings: dict[str, Any]
) -> Generator[tuple[str, dict[str, Any]]]:
    """The parts that all ways take part in."""
    sizes = settings["sizes"]
    with tempfile.TemporaryDirectory(prefix="bench-") as place:
        job = Job(
            settings["model"],
            str(Path(place) / "model"),
            settings["device"],
            settings["dtype"],
            settings["steps"],
            max(sizes),
        )
        contest = contest_of(job, options.ways, options.ours)
        progress(f"writing a {job.kind} SDXL …")
        plan = Plan(
            options.parts,
            job,
            contest,
            starts_of(contest, job, options.start_ways),
            sizes,
            options.rounds,
            options.throughput_rounds or options.rounds,
            min(options.rounds, options.start_rounds),
            options.concurrency,
            write_model(job),
            Path(place),
        )
        yield from (side_by_side if options.side_by_side else one_after_another)(plan)


def contest_of(job: Job, names: list[str] | None, variants: list[str]) -> Contest:
    """The job for these ways, and for this engine again with the settings of each variant (`NAME=VALUE,…`)."""
    ways = {name: name for name in ways_for(job.device, names)}
    jobs = dict.fromkeys(ways, job)
    for variant in variants:
        jobs[variant] = replace(job, settings=dict(one.split("=", 1) for one in variant.split(",")))
        ways[variant] = OURS
    return Contest(jobs, ways)


def _settings(options: argparse.Namespace, device: str) -> dict[str, Any]:
    model = options.model or ("full" if device == "cuda" else "small")
    return {
        "device": device,
        "model": model,
        "dtype": options.dtype or _best_dtype(device),
        "sizes": options.size or SIZES[model],
        "steps": options.steps,
        "load": os.getloadavg()[0],  # before anything of ours runs
        "remark": options.remark,
    }


def _best_dtype(device: str) -> str:
    import torch

    from diffusion.device import choose_dtype

    return str(choose_dtype(torch.device(device))).removeprefix("torch.")


def _device() -> tuple[str, str]:
    """The kind of device, and the card's name if there is one."""
    import torch

    if not torch.cuda.is_available():
        return "cpu", ""
    return "cuda", torch.cuda.get_device_name()


def _cuda(device: str) -> list[str]:
    import torch

    return [f"CUDA {torch.version.cuda}"] if device == "cuda" else []


def _slug(card: str) -> str:
    words = re.sub(r"[^a-z0-9]+", "-", card.lower().removeprefix("nvidia ")).strip("-")
    return words or "cpu"


def _options(description: str | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmarks/engine.py",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--parts",
        type=_list_of(_one_of(PARTS)),
        default=list(PARTS),
        help=f"some of {','.join(PARTS)} (default: all)",
    )
    parser.add_argument(
        "--ways",
        type=_list_of(_one_of(WAYS)),
        help=f"some of {','.join(WAYS)} (default: all that suit the device). Without ours, this engine is measured "
        "only as --ours says",
    )
    parser.add_argument(
        "--start-ways",
        type=_list_of(_one_of([*WAYS, *OWN])),
        help=f"who takes part in cold starts: the names of --ways, where ours stands for {', '.join(OWN)}, or some of "
        "these three; compiling takes minutes on a card (default: as --ways and --ours, and ours with any --ours)",
    )
    parser.add_argument(
        "--side-by-side",
        action="store_true",
        help="prepare all contestants at once, and then measure one at a time: for a machine with many cores whose "
        "minutes are dear",
    )
    parser.add_argument(
        "--ours",
        type=_variant,
        action="append",
        default=[],
        metavar="NAME=VALUE[,…]",
        help="measure this engine once more, with these environment variables; may be given again",
    )
    parser.add_argument(
        "--model", choices=SIZES, help="default: full on a card, the demo's small one on a CPU"
    )
    parser.add_argument(
        "--size",
        type=_list_of(_count),
        help="edges of the squares, in pixels (default: 1024 for full, 64,256 for small)",
    )
    parser.add_argument("--steps", type=_count, default=4, help="default: %(default)s")
    parser.add_argument("--dtype", choices=DTYPES, help="default: the best the device computes")
    parser.add_argument(
        "--rounds", type=_count, default=7, help="timed rounds (default: %(default)s)"
    )
    parser.add_argument(
        "--throughput-rounds", type=_count, help="of images a second (default: as --rounds)"
    )
    parser.add_argument(
        "--start-rounds", type=_count, default=3, help="the most of cold starts (default: 3)"
    )
    parser.add_argument(
        "--concurrency", type=_list_of(_count), default=[1, 2, 4, 8, 16], help="default: 1,2,4,8,16"
    )
    parser.add_argument(
        "--overhead-size", type=_count, default=1024, help="of the requests' images (default: 1024)"
    )
    parser.add_argument(
        "--remark", default="", help="what readers should know of this run; it stands on the page"
    )
    parser.add_argument(
        "--output", type=Path, help="default: engine-cpu.md or engine-<card>.md in the results"
    )
    return parser.parse_args()


def _one_of(names: Any) -> Any:
    def parse(text: str) -> str:
        if text not in names:
            raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(names)}")
        return text

    return parse


def _variant(text: str) -> str:
    from settings import RunnerSettings

    known = {str(field.validation_alias) for field in RunnerSettings.model_fields.values()}
    for one in text.split(","):
        name, equals, _ = one.partition("=")
        if not equals or name not in known:
            raise argparse.ArgumentTypeError(f"{one!r} sets none of {', '.join(sorted(known))}")
    return text
