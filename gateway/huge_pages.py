"""A heap in huge pages, for a process that sleeps most of the time.

While it sleeps the cores are others', and so are their caches: what takes it 10 µs again and again takes 150 once in a
while, most of it to find out where in memory each page of 4 KiB lies. In pages of 2 MiB there are few to find.
"""

import os
import sys
from contextlib import suppress
from pathlib import Path

HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
# Read when a process begins, and never again. Python's own allocator asks for no huge pages, the C library's does
# when it is told to.
SETTINGS = {"PYTHONMALLOC": "malloc", "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
# Who sets one of these has chosen an allocator.
_OWNERS = {*SETTINGS, "LD_PRELOAD", "PYTHONDEVMODE"}
_RESTARTED = "GATEWAY_HEAP_IN_HUGE_PAGES"
_FIRST_GLIBC = (2, 35)


def restart_in_huge_pages() -> None:
    """Replace this process by one like it whose heap lies in huge pages; to be called before anything else.

    Returns in that one, and where there is nothing to gain: the system gives none to who asks, the C library does not
    ask, or the environment says otherwise of how memory is allocated. What this process starts later does not inherit
    the settings.
    """
    if os.environ.pop(_RESTARTED, None) is not None:
        for name in SETTINGS:
            os.environ.pop(name, None)
    elif _can_gain() and sys.executable and not _OWNERS & os.environ.keys():
        with suppress(OSError):  # then as it is
            os.execve(  # noqa: S606 - it is this very program
                sys.executable,
                [sys.executable, *sys.orig_argv[1:]],
                {**os.environ, **SETTINGS, _RESTARTED: "1"},
            )


def _can_gain() -> bool:
    try:
        is_for_who_asks = "[madvise]" in HUGE_PAGES.read_text(encoding="ascii")
        name, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").split()
        major, minor = (int(part) for part in version.split(".")[:2])
    except (OSError, ValueError):
        return False
    return is_for_who_asks and name == "glibc" and (major, minor) >= _FIRST_GLIBC
