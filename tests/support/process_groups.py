"""Who is left of a process group, for tests of what must leave nothing behind."""

from __future__ import annotations

import time
from pathlib import Path


def members_of_group(group: int) -> dict[int, str]:
    """The living processes of one process group with their command lines; Linux only, as the tests of it."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, process_group = stat.read_text().rsplit(")", 1)[1].split()[:3]
            if int(process_group) == group and state != "Z":
                found[int(stat.parent.name)] = (stat.parent / "cmdline").read_text()
        except OSError:  # ended meanwhile
            continue
    return found


def processes_of_group(group: int) -> list[str]:
    """Their command lines alone."""
    return list(members_of_group(group).values())


def left_of_group(group: int, seconds: float = 10.0) -> list[str]:
    """Those that are still there after a while: whoever was killed takes a moment to be gone."""
    deadline = time.monotonic() + seconds
    while (left := processes_of_group(group)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left
