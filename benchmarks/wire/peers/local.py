"""Plain reading of local files: what a warm cache can do at best."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from benchmarks.wire.memory import fresh_memory
from benchmarks.wire.target import MEBIBYTE, Held, Target


def prepare(target: Target, *, folder: str) -> Callable[[], Held]:
    """`readinto` fresh memory of every large file under `folder`, one after another."""

    def load() -> Held:
        memories = []
        for file in sorted(Path(folder).rglob("*")):
            size = file.stat().st_size
            if not file.is_file() or file.is_symlink() or size < MEBIBYTE:
                continue
            memory = fresh_memory(size)
            whole = memoryview(memory)
            filled = 0
            with file.open("rb", buffering=0) as source:
                while filled < size and (count := source.readinto(whole[filled:])):
                    filled += count
            memories.append(memory)
        return Held(sum(len(memory) for memory in memories), memories)

    del target
    return load
