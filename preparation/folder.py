"""A diffusers folder on this disk, as an origin. Nothing in it is changed, and nothing outside it is followed to."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from preparation.errors import PreparationError, UsageError
from preparation.origin import OnBytes
from weights.remembered import Remembered


@dataclass(frozen=True)
class LocalFolder:
    """A folder whose files stay as they are while it is prepared: an `Origin`."""

    root: Path
    files: Mapping[str, int] = field(repr=False)

    @classmethod
    def open(cls, path: Path) -> LocalFolder:
        """List the folder, without hidden files and folders.

        Raises:
            UsageError: it is no folder, or a link in it leads out of it, to a hidden file or to a folder.
            PreparationError: a folder in it cannot be read.
        """
        try:
            if not path.is_dir():
                raise UsageError(
                    f"There is no folder {path}. Give a diffusers folder, or OWNER/NAME of a Hub repo."
                )
            root = path.resolve()
            return cls(root, _list(root))
        except OSError as error:
            raise PreparationError(
                f"Listing {path}: {error.strerror or error} ({error.filename or path}). Check its permissions, or take "
                "out what should not be published."
            ) from error

    @classmethod
    def of_file(cls, file: Path) -> LocalFolder:
        """As if the folder held this file alone: nobody asks what lies beside it. A link keeps its own name."""
        return cls(file.parent.resolve(), {file.name: file.stat().st_size})

    @property
    def label(self) -> str:
        return str(self.root)

    @property
    def home(self) -> Path:
        return self.root

    @property
    def is_local(self) -> bool:
        return True

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

    def check(
        self, paths: Mapping[str, Path], *, jobs: int, on_bytes: OnBytes, remembered: Remembered
    ) -> None:
        """A folder states no digests; publishing computes them."""

    def fingerprint(self, path: str) -> str:
        status = (self.root / path).stat()
        return f"{self.root / path}:{status.st_size}:{status.st_mtime_ns}"


def _list(root: Path) -> dict[str, int]:
    places = [root]
    # A snapshot folder of the Hub's own cache consists of links to the blobs beside it.
    if root.parent.name == "snapshots":
        places.append(root.parent.parent / "blobs")
    files: dict[str, int] = {}
    for folder, folders, names in os.walk(root, onerror=_raise):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in folders:
            _refuse_linked_folder(Path(folder, name))
        for name in sorted(names):
            file = Path(folder, name)
            if not name.startswith(".") and _followed(file, places).is_file():
                files[file.relative_to(root).as_posix()] = file.stat().st_size
    return files


def _raise(error: OSError) -> None:
    raise error


def _refuse_linked_folder(folder: Path) -> None:
    """`os.walk` neither follows such a link nor reports it, so what it leads to would silently be missing."""
    if folder.is_symlink():
        raise UsageError(
            f"{folder} is a link to a folder, {folder.resolve()}, which is not followed. Copy the folder in its place, "
            "or remove the link."
        )


def _followed(file: Path, places: Iterable[Path]) -> Path:
    """The file itself, wherever a link leads; refused unless it is there, in one of `places`, and not hidden."""
    if not file.is_symlink():
        return file
    target = file.resolve()
    place = next((place for place in places if target.is_relative_to(place)), None)
    if place is None:
        raise UsageError(
            f"{file} is a link that leads out of the folder, to {target}. Copy the file into the folder if it should "
            "be published, or remove the link."
        )
    if any(part.startswith(".") for part in target.relative_to(place).parts):
        raise UsageError(
            f"{file} is a link to a hidden file, {target}, and hidden files are never published. Copy the file if it "
            "should be, or remove the link."
        )
    if not target.exists():
        raise UsageError(
            f"{file} is a link to {target}, which is not there. Is the download or checkout complete? If the file "
            "is not needed, remove the link."
        )
    return target
