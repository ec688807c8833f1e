"""Making images, beside stock diffusers and what makes it faster, in the same run.

`make bench-engine` runs it, with the peers installed in .venv-bench. On a card it measures a model of SDXL's full size,
on a CPU the demo's small one. Weights are random: time does not depend on their values. It writes engine-<device>.md,
.svg and .json into benchmarks/results/. Parts run on different days stand side by side in the JSON.
`make bench-engine ARGS="--parts single --rounds 1 --output demo-output/engine.md"` is a look.
On a rented card with many cores, `--side-by-side` lets all compilers work at once; what is measured is measured alone.
"""

from __future__ import annotations

import sys
from pathlib import Path

# As a script this file's own folder would come first, where `weights` is benchmarks/weights.py and not the room.
sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.generation.command import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main(__doc__))
