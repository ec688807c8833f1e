"""Memory before and after a measurement: the free pages made warm, and the peak of a process and its children.

Virtual machines with free page reporting give freed pages back to their host two seconds later. The first touch of
fresh memory then costs 2.5 s/GiB instead of 0.17 (measured on one), and whoever runs after a large process that has
just ended looks faster than it is. So before every measurement a child touches more memory than anyone will need and
ends, and all meet the same.
"""

from __future__ import annotations

import mmap
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = 4096
SHARE_OF_FREE = 0.85
# Seconds. Linux reports what was freed in passes 2 s apart (mm/page_reporting.c). A pass that earlier frees had brought
# about would fall into every second measurement and take warm pages away: the same load took 0.8 s or 1.0.
HELD_FOR = 2.6


def warm_free_memory(count: int) -> int:
    """Have a child touch `count` bytes, or most of what is free, and end; returns how many."""
    count = min(count, int(_meminfo("MemFree") * SHARE_OF_FREE)) // PAGE * PAGE
    if count > 0:
        subprocess.run(
            [sys.executable, "-m", "benchmarks.wire.memory", str(count)], cwd=ROOT, check=True
        )
    return count


def touch(count: int) -> None:
    with mmap.mmap(-1, count, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory.madvise(mmap.MADV_HUGEPAGE)
        memory[::PAGE] = bytes(len(range(0, count, PAGE)))
        time.sleep(HELD_FOR)


def fresh_memory(count: int) -> mmap.mmap:
    """Private memory that nobody has touched, in huge pages where the system has them."""
    memory = mmap.mmap(-1, count, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def reset_peak() -> None:
    """Begin VmHWM anew, where the kernel lets a process do that."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def own(field: str) -> int:
    """A line of /proc/self/status, in bytes: VmRSS is what is resident now, VmHWM the most there was."""
    return _status("self").get(field, 0)


def of_tree(process: int) -> int:
    """Bytes of memory of a process and all its children: private memory of each, what they share once."""
    statuses = [_status(str(number)) for number in _tree(process)]
    private = sum(status.get("RssAnon", 0) for status in statuses)
    return private + max((status.get("RssShmem", 0) for status in statuses), default=0)


def _tree(process: int) -> list[int]:
    found = [process]
    for number in found:  # grows while it is walked
        for children in Path(f"/proc/{number}/task").glob("*/children"):
            try:
                found += [int(child) for child in children.read_text().split()]
            except OSError:
                continue  # ended meanwhile
    return found


def _status(process: str) -> dict[str, int]:
    return _kibibytes(Path(f"/proc/{process}/status"))


def _meminfo(field: str) -> int:
    return _kibibytes(Path("/proc/meminfo")).get(field, 0)


def _kibibytes(path: Path) -> dict[str, int]:
    try:
        lines = path.read_text().splitlines()
    except OSError:  # another system, or a process that has ended
        return {}
    fields = (line.split() for line in lines if line.endswith(" kB"))
    return {name.rstrip(":"): int(count) * 1024 for name, count, _ in fields}


if __name__ == "__main__":
    touch(int(sys.argv[1]))
