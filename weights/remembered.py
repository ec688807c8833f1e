"""Digests that have been computed before, kept in a file: what nobody has touched since is not hashed again.

A file is known by its place on the disk, whatever its name, and untouched while its size and times are what they were.
Whoever wants it read all the same leaves this out. What is sent is compared with its digests again anyway.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

from pydantic import ValidationError

from weights.digests import Progress, describe_file
from weights.manifest import FileEntry

_FORMAT: Final = "lightning-in-a-bucket/digests/2"
# Smaller files are hashed in a millisecond, and could change twice within one tick of the file system's clock.
_WORTH_IT = 1_000_000  # bytes
_NAMELESS = "file"
_MOST = 1000  # files; beyond that the ones that were seen first are forgotten


class Remembered:
    """The digests kept in `file`, which need not exist. Safe for threads; a disk that refuses is no error."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._lock = threading.Lock()
        self._found: dict[str, Any] = {}
        with contextlib.suppress(OSError, ValueError):
            kept = json.loads(file.read_bytes())
            if isinstance(kept, dict) and kept.get("format") == _FORMAT:
                self._found = dict(kept.get("files") or {})

    def recall(self, path: str, status: os.stat_result) -> FileEntry | None:
        """What a file was found to be when it was as `status` says it is now, as the entry for `path`."""
        kept = self._found.get(_identity(status))
        if not isinstance(kept, dict) or kept.get("state") != _state(status):
            return None
        try:
            entry = FileEntry.model_validate({**kept["entry"], "path": path})
        except (KeyError, TypeError, ValidationError):
            return None
        return entry if entry.size == status.st_size else None

    def read(self, file: Path, on_bytes: Progress | None = None) -> FileEntry:
        """Read a file, known or not, and remember what it is found to be. The entry's path is not its own.

        Raises OSError.
        """
        before = file.stat()
        entry = describe_file(file, _NAMELESS, on_bytes)
        self.keep(entry, before, file.stat())
        return entry

    def keep(self, entry: FileEntry, before: os.stat_result, after: os.stat_result) -> None:
        """Remember what a file was found to be, unless it was written to between the two looks at it."""
        found = (_identity(before), _state(before))
        if entry.size < _WORTH_IT or found != (_identity(after), _state(after)):
            return
        with self._lock:
            identity, state = found
            self._found.pop(identity, None)
            self._found[identity] = {"state": state, "entry": entry.model_dump(mode="json")}
            while len(self._found) > _MOST:
                del self._found[next(iter(self._found))]
            self._write()

    def linked(self, statuses: Iterable[os.stat_result]) -> None:
        """Know files again that have got another name since, which changes one of their times and nothing else."""
        with self._lock:
            for status in statuses:
                kept = self._found.get(_identity(status))
                state = _state(status)
                if isinstance(kept, dict) and kept.get("state", [])[:2] == state[:2]:
                    kept["state"] = state
            self._write()

    def _write(self) -> None:
        """At once, and whole or not at all: the run may be killed before its last file is hashed."""
        text = json.dumps({"format": _FORMAT, "files": self._found})
        new = self._file.with_name(f"{self._file.name}.new")
        with contextlib.suppress(OSError):
            new.write_text(text, encoding="utf-8")
            new.replace(self._file)


def _identity(status: os.stat_result) -> str:
    return f"{status.st_dev}:{status.st_ino}"


def _state(status: os.stat_result) -> list[int]:
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns]
