"""One measurement in a process of its own: `python -m benchmarks.wire.run_one MODULE:FUNCTION OPTIONS TARGET`.

It says when its imports are done, waits for a line, reads the model once, and prints one line of JSON.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import IO, Any

from benchmarks.wire.memory import own, reset_peak
from benchmarks.wire.target import Target

KIBIBYTE = 1024  # ru_maxrss counts in these


def main() -> None:
    name, options, target_file = sys.argv[1:]
    # Libraries print what they like; the lines of JSON keep a way out of their own.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    target = Target.load(Path(target_file).read_text())
    module, _, function = name.partition(":")
    try:
        load = getattr(importlib.import_module(module), function)(target, **json.loads(options))
    except ImportError as error:
        _say(answers, skipped=str(error))
        return
    _say(answers, imported=True)
    sys.stdin.readline()
    reset_peak()
    baseline = own("VmRSS")
    started = time.monotonic()
    held = load()
    finished = time.monotonic()
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * KIBIBYTE
    _say(
        answers,
        seconds=finished - started,
        started=started,
        finished=finished,
        bytes=held.count,
        baseline_rss=baseline,
        peak_rss=own("VmHWM"),
        children_peak_rss=children,
        counters=held.counters or {},
    )
    sys.stdin.readline()  # the memory is looked at until its owner says so
    os._exit(0)  # nobody waits for gigabytes to be given back one object at a time


def _say(answers: IO[str], **fields: Any) -> None:
    print(json.dumps(fields, default=str), file=answers, flush=True)


if __name__ == "__main__":
    main()
