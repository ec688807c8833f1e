"""A diffusers folder on this disk, as an origin. Nothing in it is changed, and nothing outside it is followed to."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from preparation.errors import PreparationError, UsageError
from preparation.origin import OnBytes


@dataclass(frozen=True)
class LocalFolder:
    """A folder whose files stay as they are while it is prepared: an `Origin`."""

    root: Path
    files: Mapping[str, int] = field(repr=False)

    @classmethod
    def open(cls, path: Path) -> LocalFolder:
        """List the folder, without hidden files and folders.

        Raises:
            UsageError: it is no folder, or a link in it leads out of it.
        """
        if not path.is_dir():
            raise UsageError(
                f"There is no folder {path}. Give a diffusers folder, or OWNER/NAME of a Hub repo."
            )
        root = path.resolve()
        # A snapshot folder of the Hub's own cache consists of links to the blobs beside it.
        allowed = [root]
        if root.parent.name == "snapshots":
            allowed.append(root.parent.parent / "blobs")
        files: dict[str, int] = {}
        for folder, folders, names in os.walk(root):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            for name in sorted(names):
                if name.startswith("."):
                    continue
                file = Path(folder, name)
                target = file.resolve()
                if not any(target.is_relative_to(place) for place in allowed):
                    raise UsageError(
                        f"{file} is a link that leads out of the folder, to {target}. Copy the file into the folder "
                        "if it should be published, or remove the link."
                    )
                if target.is_file():
                    files[file.relative_to(root).as_posix()] = target.stat().st_size
        return cls(root, files)

    @property
    def label(self) -> str:
        return str(self.root)

    def read(self, path: str) -> bytes:
        try:
            return (self.root / path).read_bytes()
        except OSError as error:
            raise PreparationError(
                f"Reading {self.root / path}: {error.strerror or error}. Check the file and its permissions."
            ) from error

    def missing(self, paths: Iterable[str]) -> list[str]:  # noqa: ARG002
        return []

    def fetch(
        self,
        paths: Iterable[str],
        *,
        jobs: int,  # noqa: ARG002
        on_bytes: OnBytes,  # noqa: ARG002
    ) -> dict[str, Path]:
        return {path: (self.root / path).resolve() for path in paths}

    def check(self, paths: Mapping[str, Path], *, jobs: int, on_bytes: OnBytes) -> None:
        """A folder states no digests; publishing computes them."""

    def fingerprint(self, path: str) -> str:
        status = (self.root / path).stat()
        return f"{self.root / path}:{status.st_size}:{status.st_mtime_ns}"
