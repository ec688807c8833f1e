"""How one version differs from another, file by file, as their manifests tell. Reads nothing."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from weights.manifest import FileEntry, Manifest


@dataclass(frozen=True)
class Difference:
    """What became of the files of version `since`. `changed` and `same` are as they are now, `removed` as they were."""

    since: str
    added: tuple[FileEntry, ...]
    changed: tuple[FileEntry, ...]
    removed: tuple[FileEntry, ...]
    same: tuple[FileEntry, ...]
    recipe_changed: bool


def difference(before: Manifest, after: Manifest) -> Difference:
    """Compare two versions by paths and SHA-256."""
    old = {entry.path: entry for entry in before.files}
    new = {entry.path: entry for entry in after.files}
    shared = [entry for entry in after.files if entry.path in old]
    return Difference(
        since=before.version,
        added=tuple(entry for entry in after.files if entry.path not in old),
        changed=tuple(entry for entry in shared if entry.sha256 != old[entry.path].sha256),
        removed=tuple(entry for entry in before.files if entry.path not in new),
        same=tuple(entry for entry in shared if entry.sha256 == old[entry.path].sha256),
        recipe_changed=before.recipe != after.recipe,
    )


def total_bytes(entries: Iterable[FileEntry]) -> int:
    return sum(entry.size for entry in entries)
