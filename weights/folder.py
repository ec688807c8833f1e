"""A model's folder on a local disk: which of its files are published, and their digests."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType

from weights.digests import OnParts, Progress, consists_of, describe_file
from weights.errors import FolderError
from weights.manifest import LATEST_NAME, MANIFEST_NAME, FileEntry, is_pickle
from weights.parallel import run_all
from weights.remembered import Remembered

_NOTHING: Mapping[str, FileEntry] = MappingProxyType({})


def hash_folder(
    folder: Path,
    *,
    jobs: int = 8,
    on_bytes: Progress | None = None,
    on_entry: Callable[[FileEntry], None] | None = None,
    on_parts: OnParts | None = None,
    remembered: Remembered | None = None,
    known: Mapping[str, FileEntry] = _NOTHING,
) -> tuple[FileEntry, ...]:
    """The entries of every file under `folder`, ordered by path. `on_bytes` is told of bytes as they are hashed, and
    `on_entry` of every file, on the thread that has hashed it.

    What is `remembered` of files that nobody has touched is not computed again. A file that consists of the chunks of
    the entry `known` by its path has that one's SHA-256 too; of every other that is read, `on_parts` is told the parts.
    Hidden files are left out, and so is a manifest that `pull` left there. Raises FolderError for what must not be
    published: a pickle, a link that leads out of the folder, a name S3 or another system could misread.
    """
    # The largest first: SHA-256 has no parts that could be shared, so the last file to begin is to be a short one.
    sizes = {path: _status(folder / path).st_size for path in publishable_files(folder)}
    paths = sorted(sizes, key=lambda path: -sizes[path])

    def describe(path: str) -> FileEntry:
        file = folder / path
        before = _status(file)
        entry = remembered.recall(path, before) if remembered else None
        if entry is None:
            likely = known.get(path)
            if likely and likely.size != before.st_size:
                likely = None
            entry = _read(file, path, likely, on_bytes, on_parts)
            if remembered:
                remembered.keep(entry, before, _status(file))
        elif on_bytes:
            on_bytes(entry.size)
        if on_entry:
            on_entry(entry)
        return entry

    tasks = [partial(describe, path) for path in paths]
    return tuple(sorted(run_all(tasks, jobs, name="hash"), key=lambda entry: entry.path))


def publishable_files(folder: Path) -> list[str]:
    """The paths, relative to `folder` and sorted, of the files that would be published. Raises FolderError."""
    if not folder.is_dir():
        raise FolderError(f"cannot publish {folder}: it is not a folder")
    root = folder.resolve()
    paths = []
    for parent, folders, names in os.walk(root, onerror=_refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in folders:
            if Path(parent, name).is_symlink():
                raise FolderError(
                    f"cannot publish {Path(parent, name)}: it is a link to a folder, which is not followed. "
                    "Put the files themselves there"
                )
        for name in names:
            file = Path(parent, name)
            path = file.relative_to(root).as_posix()
            if name.startswith(".") or path in (MANIFEST_NAME, LATEST_NAME):
                continue
            if is_pickle(path):
                raise FolderError(
                    f"cannot publish {folder / path}: it may hold a pickle, which runs code when it is opened. "
                    "Convert it to safetensors, or take it out of the folder"
                )
            target = file.resolve()
            if not target.is_relative_to(root) or _is_hidden(target.relative_to(root)):
                raise FolderError(
                    f"cannot publish {folder / path}: it is a link to {target}, which is hidden or outside the "
                    "folder. Copy the file into the folder"
                )
            paths.append(path)
    if not paths:
        raise FolderError(f"cannot publish {folder}: it holds no files")
    return sorted(paths)


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _refuse(error: OSError) -> None:
    raise FolderError(f"cannot read {error.filename}: {error.strerror}") from error


def _read(
    file: Path,
    path: str,
    likely: FileEntry | None,
    on_bytes: Progress | None,
    on_parts: OnParts | None,
) -> FileEntry:
    try:
        if likely and consists_of(file, likely.chunks, on_bytes):
            return likely
        return describe_file(file, path, on_bytes, on_parts)
    except OSError as error:
        raise FolderError(f"cannot read {file}: {error.strerror}") from error
    except ValueError as error:
        raise FolderError(f"cannot publish {file}: {error}") from None


def _status(file: Path) -> os.stat_result:
    try:
        return file.stat()
    except OSError as error:
        raise FolderError(f"cannot read {file}: {error.strerror}") from error
