"""A model's folder on a local disk: which of its files are published, and their digests."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

from weights.digests import Progress, describe_file
from weights.errors import FolderError
from weights.manifest import LATEST_NAME, MANIFEST_NAME, FileEntry, is_pickle
from weights.parallel import run_all


def hash_folder(
    folder: Path, *, jobs: int = 8, on_bytes: Progress | None = None
) -> tuple[FileEntry, ...]:
    """The entries of every file under `folder`, ordered by path. `on_bytes` is told of bytes as they are hashed.

    Hidden files are left out, and so is a manifest that `pull` left there. Raises FolderError for what must not be
    published: a pickle, a link that leads out of the folder, a name S3 or another system could misread.
    """
    files = publishable_files(folder)
    tasks = [partial(_describe, folder / path, path, on_bytes) for path in files]
    return tuple(run_all(tasks, jobs, name="hash"))


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


def _describe(file: Path, path: str, on_bytes: Progress | None) -> FileEntry:
    try:
        return describe_file(file, path, on_bytes)
    except OSError as error:
        raise FolderError(f"cannot read {file}: {error.strerror}") from error
    except ValueError as error:
        raise FolderError(f"cannot publish {file}: {error}") from None
