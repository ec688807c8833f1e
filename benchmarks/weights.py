"""Getting a model from a bucket into memory, beside other people's ways of doing it, in the same run.

`make bench` runs it, with the peers installed in .venv-bench; `make bench ARGS="--parts free --size 256MB --rounds 1"`
is a look. It publishes a model into a folder, serves that from nginx on loopback, and writes
benchmarks/results/weights.md with its pictures. Parts run on different days stand side by side in weights.json.
"""

from __future__ import annotations

import sys
from pathlib import Path

# As a script this file's own folder would come first, where `weights` is this file and not the room.
sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.wire.command import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main(__doc__))
