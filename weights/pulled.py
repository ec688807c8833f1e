"""Which model a folder holds that `pull` has written, and whether all of it is there.

A manifest says what a version holds and not whose it is: two models with the same content are the same version. So
`pull` notes beside it which model it was asked for. What the bytes are worth is found out as they are read.
"""

from __future__ import annotations

import json
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from weights.errors import FolderError, ManifestError
from weights.manifest import MANIFEST_NAME, Manifest, parse_manifest
from weights.snapshot import Snapshot, published_snapshot

NOTE_NAME = ".pulled.json"  # hidden, so that publishing the folder leaves it out
_FORMAT: Final = "lightning-in-a-bucket/pulled/1"
_AGAIN = "Pull the model into it again"


@dataclass(frozen=True)
class Note:
    """What `pull` was asked for. The bucket's name is for people: the version says what its bytes are."""

    model_path: str
    version: str
    bucket: str


def dump_note(note: Note) -> bytes:
    fields = {"model": note.model_path, "version": note.version, "bucket": note.bucket}
    return json.dumps({"format": _FORMAT, **fields}, indent=1).encode() + b"\n"


def pulled_snapshot(folder: Path, model_path: str, version: str | None = None) -> Snapshot:
    """The model in `folder`, if it is the one at `model_path`, of the version `version` (None: any), and whole.

    Raises FolderError, which says why it is not to be read from there. Files are compared by size alone: each of their
    chunks is verified when it is read.
    """
    if not folder.is_dir():
        raise FolderError(f"there is no folder {folder}")
    # First: `pull` writes it last, so without it nothing else needs to make sense.
    manifest = _manifest(folder)
    note = _note(folder)
    if note.model_path != model_path:
        raise FolderError(f"{folder} holds {note.model_path}, and MODEL_PATH is {model_path}")
    if note.version != manifest.version:
        raise FolderError(
            f"{folder / MANIFEST_NAME} is of version {manifest.version}, and {NOTE_NAME} beside it of {note.version}. "
            f"{_AGAIN}"
        )
    if version not in (None, manifest.version):
        raise FolderError(
            f"{folder} holds version {manifest.version}, and MODEL_VERSION is {version}"
        )
    for entry in manifest.files:
        _check_size(folder / entry.path, entry.size)
    return published_snapshot(model_path, manifest, folder)


def _manifest(folder: Path) -> Manifest:
    data = _read(
        folder / MANIFEST_NAME, f"{folder} has no {MANIFEST_NAME}: nothing was pulled to its end"
    )
    try:
        return parse_manifest(data, str(folder / MANIFEST_NAME), advice=_AGAIN)
    except ManifestError as error:
        raise FolderError(str(error)) from None


def _note(folder: Path) -> Note:
    where = folder / NOTE_NAME
    data = _read(where, f"{folder} does not say which model it holds: it has no {NOTE_NAME}")
    try:
        found: Any = json.loads(data)
        if found["format"] != _FORMAT:
            raise ValueError("another format")
        return Note(str(found["model"]), str(found["version"]), str(found["bucket"]))
    except (ValueError, KeyError, TypeError, RecursionError):
        raise FolderError(f"{where} is not what `pull` writes. {_AGAIN}") from None


def _read(file: Path, missing: str) -> bytes:
    try:
        return file.read_bytes()
    except FileNotFoundError:
        raise FolderError(f"{missing}. {_AGAIN}") from None
    except OSError as error:
        raise FolderError(f"cannot read {file}: {error.strerror}. {_AGAIN}") from None


def _check_size(file: Path, size: int) -> None:
    try:
        found = file.stat()
    except FileNotFoundError:
        raise FolderError(f"{file} is missing. {_AGAIN}") from None
    except OSError as error:
        raise FolderError(f"cannot read {file}: {error.strerror}. {_AGAIN}") from None
    if not stat.S_ISREG(found.st_mode) or found.st_size != size:
        raise FolderError(f"{file} has {found.st_size} bytes where {size} were published. {_AGAIN}")
