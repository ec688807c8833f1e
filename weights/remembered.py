"""Digests that an earlier run has computed, kept in a file: a folder that nobody has touched is not hashed again.

A file counts as untouched while its place on the disk, size and times are what they were. Whoever wants it read all
the same leaves this out. What is sent is compared with its digests again anyway.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
from pathlib import Path
from typing import Any, Final

from pydantic import ValidationError

from weights.manifest import FileEntry

_FORMAT: Final = "lightning-in-a-bucket/digests/1"
# Smaller files are hashed in a millisecond, and could change twice within one tick of the file system's clock.
_WORTH_IT = 1_000_000  # bytes


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
        """What `path` was found to be when it was as `status` says it is now."""
        kept = self._found.get(path)
        if not isinstance(kept, dict) or kept.get("state") != _state(status):
            return None
        try:
            entry = FileEntry.model_validate(kept.get("entry"))
        except ValidationError:
            return None
        return entry if (entry.path, entry.size) == (path, status.st_size) else None

    def keep(self, entry: FileEntry, before: os.stat_result, after: os.stat_result) -> None:
        """Remember what a file was found to be, unless it was written to between the two looks at it."""
        if entry.size < _WORTH_IT or _state(before) != _state(after):
            return
        with self._lock:
            self._found[entry.path] = {
                "state": _state(after),
                "entry": entry.model_dump(mode="json"),
            }
            text = json.dumps({"format": _FORMAT, "files": self._found})
            # At once, and whole or not at all: the run may be killed before its last file is hashed.
            new = self._file.with_name(f"{self._file.name}.new")
            with contextlib.suppress(OSError):
                new.write_text(text, encoding="utf-8")
                new.replace(self._file)


def _state(status: os.stat_result) -> list[int]:
    return [status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]
