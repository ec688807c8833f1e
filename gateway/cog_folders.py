"""The folders that Cog's server (0.23) makes for each prediction and leaves there, which fills a disk in the end."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

# Where it makes them, whatever TMPDIR says.
COGS_FOLDERS = Path("/tmp/coglet/predictions")  # noqa: S108
# Many together take 0.2 ms each, one alone takes 1.2 (ext4, 2 cores of 2026).
CLEAR_AWAY_EVERY_S = 5.0


class CogFolders:
    """Clears them away once their predictions are over, for one event loop. Only empty ones go: the Runner gives out
    URLs, and no files.
    """

    def __init__(self) -> None:
        self._in_use: Counter[str] = Counter()
        self._over: list[str] = []
        self._due: list[str] = []
        self._timer: asyncio.TimerHandle | None = None

    def use(self, name: str) -> None:
        """Cog is asked for a prediction, and makes them: they stay at least until `leave`."""
        self._in_use[name] += 1

    def leave(self, name: str) -> None:
        """Have them cleared away in 5 to 10 s: of one that was given up, Cog may not have made them yet."""
        self._in_use[name] -= 1
        if not self._in_use[name]:
            del self._in_use[name]
        self._over.append(name)
        if self._timer is None:
            self._wait()

    def close(self) -> None:
        """Clear away those that are left, with Cog's server gone."""
        if self._timer is not None:
            self._timer.cancel()
        _clear_away([*self._due, *self._over])

    def _wait(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(CLEAR_AWAY_EVERY_S, self._next)

    def _next(self) -> None:
        due, self._due, self._over, self._timer = self._due, self._over, [], None
        unused = [name for name in due if name not in self._in_use]
        if unused:
            asyncio.get_running_loop().run_in_executor(None, _clear_away, unused)
        if self._due:
            self._wait()


def _clear_away(names: Iterable[str]) -> None:
    for name in names:
        folder = COGS_FOLDERS / name
        for path in (folder / "inputs", folder / "outputs", folder):
            with suppress(OSError):
                path.rmdir()
