"""Reading a version to a folder, or only to check it: every byte verified, nothing half-written under its name."""

from __future__ import annotations

import errno
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from weights.bucket import Bucket
from weights.digests import Progress, describe_file
from weights.errors import FolderError, WeightsError
from weights.manifest import CHUNK_SIZE, MANIFEST_NAME, dump_manifest
from weights.reader import ChunkReader
from weights.snapshot import Chunk, Snapshot, SnapshotFile
from weights.stream import DEFAULT_CONNECTIONS


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
    """Read every byte of a version and compare it with the manifest; goes on after a corrupt object.

    Raises WeightsError for a bare folder, which has nothing to compare with.
    """
    if not snapshot.verifiable:
        raise WeightsError(
            f"{bucket.url(snapshot.model_path)}/ is a bare folder without digests: there is nothing to verify it "
            "against. Publish it with scripts/prepare_model.py"
        )
    reader = ChunkReader(bucket, threading.Event())
    problems: dict[str, str] = {}
    bytes_read = 0
    lock = threading.Lock()
    memory = threading.local()

    def check(chunk: Chunk) -> None:
        nonlocal bytes_read
        try:
            reader.read(chunk, [_scratch(memory, chunk.length)])
        except WeightsError as error:
            with lock:
                problems.setdefault(chunk.file.path, str(error))
            return
        with lock:
            bytes_read += chunk.length
        if on_bytes:
            on_bytes(chunk.length)

    _for_each(check, _chunks(snapshot.files), connections)
    return VerifyReport(bytes_read, tuple(problems[path] for path in sorted(problems)))


def pull(
    bucket: Bucket,
    snapshot: Snapshot,
    folder: Path,
    *,
    connections: int = DEFAULT_CONNECTIONS,
    on_bytes: Progress | None = None,
) -> None:
    """Write a version to `folder` as a plain diffusers folder, its manifest beside it, written last.

    A file is written under a temporary name and takes its own once it is whole, verified and on the disk; files
    that are there already and right are kept. Raises FolderError when the disk is full or refuses.
    """
    folder.mkdir(parents=True, exist_ok=True)
    wanted = [file for file in snapshot.files if not _is_right(folder, file, on_bytes)]
    _check_space(folder, sum(file.size for file in wanted))
    reader = ChunkReader(bucket, threading.Event())
    memory = threading.local()
    for file in wanted:
        target = folder / file.path
        partial = target.with_name(f".{target.name}.part")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with partial.open("wb") as sink:
                descriptor = sink.fileno()
                os.truncate(descriptor, file.size)

                def fetch(chunk: Chunk, descriptor: int = descriptor) -> None:
                    data = _scratch(memory, chunk.length)
                    reader.read(chunk, [data])
                    _write_all(descriptor, data, chunk.start)
                    if on_bytes:
                        on_bytes(chunk.length)

                _for_each(fetch, file.chunks(), connections)
                os.fsync(descriptor)
            partial.replace(target)
        except OSError as error:
            raise _disk_error(target, error) from error
        finally:
            partial.unlink(missing_ok=True)
    if snapshot.manifest:
        _write_whole(folder / MANIFEST_NAME, dump_manifest(snapshot.manifest))


def _is_right(folder: Path, file: SnapshotFile, on_bytes: Progress | None) -> bool:
    """Whether the file is in the folder already with the right bytes, by its digests; never true without any."""
    target = folder / file.path
    if file.digests is None or not target.is_file() or target.stat().st_size != file.size:
        return False
    if describe_file(target, file.path).chunks != file.digests:
        return False
    if on_bytes:
        on_bytes(file.size)
    return True


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise FolderError(
            f"cannot write to {folder}: {needed / 1e9:.2f} GB are needed and {free / 1e9:.2f} GB are free. "
            "Free some space or pull to another disk"
        )


def _disk_error(target: Path, error: OSError) -> FolderError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        advice = "The disk is full: free some space or pull to another disk"
    else:
        advice = "Check the folder's permissions, or pull to another one"
    return FolderError(f"cannot write {target}: {error.strerror}. {advice}")


def _write_all(descriptor: int, data: memoryview, position: int) -> None:
    while data:
        count = os.pwrite(descriptor, data, position)
        data = data[count:]
        position += count


def _write_whole(target: Path, data: bytes) -> None:
    partial = target.with_name(f".{target.name}.part")
    try:
        with partial.open("wb") as sink:
            sink.write(data)
            sink.flush()
            os.fsync(sink.fileno())
        partial.replace(target)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise _disk_error(target, error) from error


def _chunks(files: Iterable[SnapshotFile]) -> Iterator[Chunk]:
    for file in files:
        yield from file.chunks()


def _scratch(memory: threading.local, length: int) -> memoryview:
    """This thread's own reusable chunk of memory."""
    if not hasattr(memory, "chunk"):
        memory.chunk = memoryview(bytearray(CHUNK_SIZE))
    chunk: memoryview = memory.chunk
    return chunk[:length]


def _for_each(task: Callable[[Chunk], None], chunks: Iterable[Chunk], connections: int) -> None:
    with ThreadPoolExecutor(connections, thread_name_prefix="weights") as pool:
        futures = [pool.submit(task, chunk) for chunk in chunks]
        try:
            for future in futures:
                future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
