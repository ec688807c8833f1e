"""A runner of a few lines, for tests of what runs and watches Cog: dies, fails and takes its time when told."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from cog import BaseRunner, Input


class Runner(BaseRunner):
    def setup(self) -> None:
        print("setting up")
        match os.environ.get("SETUP"):
            case "fails":
                raise RuntimeError("the bucket refused: try another key")
            case "fails once":
                marker = Path(os.environ["SETUP_MARKER"])
                if not marker.exists():
                    marker.touch()
                    raise RuntimeError("the network is away")
            case "never ends":
                while True:
                    time.sleep(1)

    def run(self, prompt: str = Input(default=""), seconds: float = Input(default=0.0)) -> str:
        print(f"running {prompt}")
        print(f"complaining of {prompt}", file=sys.stderr)
        if prompt == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(seconds)
        return prompt.upper()
