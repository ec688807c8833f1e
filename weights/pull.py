"""Reading a version to a folder, or only to check it: every byte verified, nothing half-written under its name."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from weights.bucket import Bucket
from weights.chunk_reader import ChunkReader
from weights.chunks import Chunk, SnapshotFile
from weights.digests import Progress, consists_of
from weights.errors import (
    BucketError,
    CorruptObjectError,
    FolderError,
    ManifestError,
    ObjectChangedError,
    WeightsError,
)
from weights.manifest import MANIFEST_NAME, dump_manifest, parse_manifest
from weights.pulled import NOTE_NAME, Note, dump_note
from weights.snapshot import Snapshot

DEFAULT_CONNECTIONS = 16


@dataclass(frozen=True)
class VerifyReport:
    """What `verify` found: the bytes it read, and one line for every object that is not what was published."""

    bytes_read: int
    problems: tuple[str, ...]


def verify(
    bucket: Bucket,
    snapshot: Snapshot,
    *,
    connections: int = DEFAULT_CONNECTIONS,
    on_bytes: Progress | None = None,
) -> VerifyReport:
    """Read every byte of a version and compare it with the manifest; goes on after a corrupt or missing object.

    Raises BucketError when the bucket cannot be read, WeightsError for a bare folder, which has nothing to compare
    with.
    """
    if not snapshot.verifiable:
        raise WeightsError(
            f"{bucket.url(snapshot.model_path)}/ is a bare folder without digests: there is nothing to verify it "
            "against. Publish it with scripts/prepare_model.py"
        )
    reading = ChunkReader(bucket.reader, connections)
    problems: dict[str, str] = {}
    bytes_read = 0
    lock = threading.Lock()

    def check(chunk: Chunk) -> None:
        nonlocal bytes_read
        try:
            reading.read(chunk)
        except BucketError as error:
            if error.code != "NoSuchKey":
                raise  # nothing is known of bytes that could not be read
            problem = str(error)
        except (CorruptObjectError, ObjectChangedError) as error:
            problem = str(error)
        else:
            with lock:
                bytes_read += chunk.length
            if on_bytes:
                on_bytes(chunk.length)
            return
        with lock:
            problems.setdefault(chunk.file.path, problem)

    reading.each(_chunks(snapshot.files), check)
    for file in snapshot.files:
        if file.size == 0 and (size := bucket.size(file.key)) != 0:
            found = "is missing" if size is None else f"has {size} bytes"
            problems[file.path] = (
                f"{bucket.url(file.key)} {found} where an empty file was published"
            )
    return VerifyReport(bytes_read, tuple(problems[path] for path in sorted(problems)))


def pull(
    bucket: Bucket,
    snapshot: Snapshot,
    folder: Path,
    *,
    connections: int = DEFAULT_CONNECTIONS,
    on_bytes: Progress | None = None,
) -> None:
    """Write a version to `folder` as a plain diffusers folder, with a note of which model it is and its manifest.

    The manifest comes last: a folder without one is never taken for a model. A file is written under a temporary name
    and takes its own once it is whole, verified and on the disk; files that are there already and right are kept.
    Raises FolderError when the disk is full or refuses.
    """
    with _disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    targets = {file.path: _target(folder, file.path) for file in snapshot.files}
    wanted = [file for file in snapshot.files if not _is_right(targets[file.path], file, on_bytes)]
    _check_space(folder, sum(file.size for file in wanted))
    _forget_other_version(folder, snapshot)
    reading = ChunkReader(bucket.reader, connections)
    for file in wanted:
        with _replacing(targets[file.path]) as descriptor:
            os.truncate(descriptor, file.size)

            def fetch(chunk: Chunk, descriptor: int = descriptor) -> None:
                data = reading.read(chunk)
                if reading.stopped.is_set():
                    return  # interrupted: the file is no longer ours to write
                _write_all(descriptor, data, chunk.start)
                if on_bytes:
                    on_bytes(chunk.length)

            reading.each(file.chunks(), fetch)
    if snapshot.manifest:
        note = Note(snapshot.model_path, snapshot.version, bucket.name)
        _write_small(_target(folder, NOTE_NAME), dump_note(note))
        _write_small(_target(folder, MANIFEST_NAME), dump_manifest(snapshot.manifest))


def _target(folder: Path, path: str) -> Path:
    """Where a file goes, its folders made. Raises FolderError where a link would lead out of `folder`."""
    target = folder / path
    with _disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
    if not target.parent.resolve().is_relative_to(folder.resolve()):
        raise FolderError(
            f"cannot write {target}: {target.parent} is a link to {target.parent.resolve()}, outside the folder. "
            "Remove the link, or pull to another folder"
        )
    return target


def _is_right(target: Path, file: SnapshotFile, on_bytes: Progress | None) -> bool:
    """Whether the file is there already with the right bytes, by its digests; never true without any."""
    if file.digests is None or not target.is_file() or target.stat().st_size != file.size:
        return False
    with _disk_errors(target):
        if not consists_of(target, file.digests):
            return False
    if on_bytes:
        on_bytes(file.size)
    return True


def _forget_other_version(folder: Path, snapshot: Snapshot) -> None:
    """Another version's manifest would lie about the folder as soon as one file of this one is in it.

    The weights only that version had go too: a folder of two versions' weights is neither's.
    """
    manifest_file = folder / MANIFEST_NAME
    try:
        other = parse_manifest(manifest_file.read_bytes(), str(manifest_file))
    except (OSError, ManifestError):
        return
    if other.version == snapshot.version:
        return
    with _disk_errors(folder):
        manifest_file.unlink()
        for path in {entry.path for entry in other.files} - {file.path for file in snapshot.files}:
            _target(folder, path).unlink(missing_ok=True)


@contextlib.contextmanager
def _replacing(target: Path) -> Iterator[int]:
    """A file descriptor to write to, whose file takes the place of `target` once all is on the disk, or vanishes.

    The temporary name is this process's alone: two that pull into one folder do not write into each other's files.
    """
    with _disk_errors(target):
        descriptor, name = tempfile.mkstemp(
            dir=target.parent, prefix=f".{target.name}.", suffix=".part"
        )
        try:
            yield descriptor
            os.fsync(descriptor)
            os.fchmod(descriptor, 0o644)  # mkstemp's is for this user alone
            Path(name).replace(target)
        finally:
            os.close(descriptor)
            Path(name).unlink(missing_ok=True)


def _write_small(target: Path, data: bytes) -> None:
    with _replacing(target) as descriptor:
        _write_all(descriptor, memoryview(data), 0)


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise FolderError(
            f"cannot write to {folder}: {needed / 1e9:.2f} GB are needed and {free / 1e9:.2f} GB are free. "
            "Free some space or pull to another disk"
        )


@contextlib.contextmanager
def _disk_errors(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            advice = "The disk is full: free some space or pull to another disk"
        else:
            advice = "Check that it is a folder you may write to, or pull to another one"
        raise FolderError(f"cannot write {target}: {error.strerror}. {advice}") from error


def _write_all(descriptor: int, data: memoryview, position: int) -> None:
    while data:
        count = os.pwrite(descriptor, data, position)
        data = data[count:]
        position += count


def _chunks(files: Iterable[SnapshotFile]) -> Iterator[Chunk]:
    for file in files:
        yield from file.chunks()
