"""What a place that files come from must offer: their names and sizes, their bytes, and how to get them onto this disk.

Hub repos, local folders and folders in buckets are origins; the plan and the assembly know no more of them than this.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Protocol

from weights.remembered import Remembered

OnBytes = Callable[[int], None]


class Origin(Protocol):
    """A set of files that does not change while it is used. Every error is one of `prepare.EXPECTED_ERRORS`."""

    @property
    def label(self) -> str:
        """What to call it in a message: "owner/name", "/models/mine", "s3://bucket/models/mine"."""

    @property
    def files(self) -> Mapping[str, int]:
        """Size in bytes by path, with forward slashes."""

    @property
    def home(self) -> Path:
        """Where on this disk its files are, or will be once they are fetched. May not exist yet."""

    @property
    def is_local(self) -> bool:
        """Whether every file is on this disk, outside any cache: nothing is ever fetched."""

    def read(self, path: str) -> bytes:
        """A small file, whole."""

    def missing(self, paths: Iterable[str]) -> list[str]:
        """Those of `paths` that are not on this disk yet."""

    def fetch(self, paths: Iterable[str], *, jobs: int, on_bytes: OnBytes) -> dict[str, Path]:
        """Bring the files onto this disk; `on_bytes` hears of every byte that had to move."""

    def check(
        self, paths: Mapping[str, Path], *, jobs: int, on_bytes: OnBytes, remembered: Remembered
    ) -> None:
        """Compare fetched files with the digests their origin gives, where it gives any.

        The digests by which they will be published, computed along the way, go into `remembered`.
        """

    def fingerprint(self, path: str) -> str:
        """Changes whenever the file's content does."""
