"""A folder in a bucket, as an origin: a diffusers folder as somebody uploaded it, or a model published by this product.

Of a published model the version that is served is taken, and every byte is held to its manifest. Any other folder is
listed, and every object held to the ETag and size it was listed with. Which bucket, and who reads it, is the caller's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

from preparation import download
from preparation.access import Access
from preparation.errors import PreparationError, UsageError
from preparation.lock import claim
from preparation.origin import OnBytes
from preparation.source import SourceName
from weights import Bucket, BucketError, Manifest, ManifestError, WeightsError
from weights.chunk_reader import ChunkReader
from weights.chunks import SnapshotFile
from weights.manifest import FORMAT, LATEST_NAME, MANIFEST_NAME, parse_latest, parse_manifest
from weights.remembered import Remembered
from weights.snapshot import LATEST_LIMIT, MANIFEST_LIMIT

_SHOWN = 5  # names of what is there, where it is not what was looked for


@dataclass(frozen=True)
class BucketOrigin:
    """An `Origin`. `published` is the manifest of a model that this product published; None for a bare folder."""

    label: str
    bucket: Bucket
    access: Access
    cache: Path
    server: str
    objects: Mapping[str, SnapshotFile] = field(repr=False)
    published: Manifest | None = field(default=None, repr=False)

    @cached_property
    def files(self) -> Mapping[str, int]:
        return {path: file.size for path, file in self.objects.items()}

    @property
    def home(self) -> Path:
        return self.cache

    @property
    def is_local(self) -> bool:
        return False

    @property
    def recipe(self) -> dict[str, Any] | None:
        """How a published model wants to be run, as its manifest says."""
        return self.published.recipe if self.published else None

    def read(self, path: str) -> bytes:
        place = self.fetch([path], jobs=1, on_bytes=lambda _size: None)[path]
        with self._disk_errors():
            return place.read_bytes()

    def missing(self, paths: Iterable[str]) -> list[str]:
        return [path for path in paths if not self._blob(path).is_here]

    def fetch(self, paths: Iterable[str], *, jobs: int, on_bytes: OnBytes) -> dict[str, Path]:
        blobs = {path: self._blob(path) for path in paths}
        wanted = [blob for blob in blobs.values() if not blob.is_here]
        if wanted:
            with (
                claim(self.cache),
                self._disk_errors(),
                explained(self.access, "reading", self.label),
            ):
                reading = ChunkReader(self.bucket.reader, jobs)
                download.download(wanted, reading, on_bytes=on_bytes, explained=self._explain)
        return {path: blob.place for path, blob in blobs.items()}

    def check(
        self, paths: Mapping[str, Path], *, jobs: int, on_bytes: OnBytes, remembered: Remembered
    ) -> None:
        blobs = [self._blob(path) for path in paths]
        with self._disk_errors():
            download.check(blobs, jobs=jobs, on_bytes=on_bytes, remembered=remembered)

    def fingerprint(self, path: str) -> str:
        file = self.objects[path]
        return f"{self.server} {self.label}/{path}:{file.size}:{file.content or file.etag}"

    def _blob(self, path: str) -> download.Blob:
        return download.blob_of(self.objects[path], self.cache, self.server)

    def _explain(self, file: SnapshotFile, error: WeightsError) -> Exception:
        return self.access.explain(error, "reading", self.bucket.url(file.key))

    @contextmanager
    def _disk_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise PreparationError(
                f"Downloading {self.label} into {self.cache}: {error.strerror or error}. Check the disk and its "
                "permissions, or choose another --destdir; what has arrived is kept."
            ) from error


def open_origin(
    name: SourceName, bucket: Bucket, access: Access, *, cache: Path, server: str
) -> BucketOrigin:
    """Find out what lies in a folder of a bucket; reads a few kilobytes and lists.

    Raises:
        UsageError: there is no such bucket or folder, no right to read it, or a key leads out of the folder.
        PreparationError: the server cannot be reached.
        ManifestError: what says that it was published is not to be trusted.
    """
    label = bucket.url(name.prefix).rstrip("/")
    with explained(access, "reading", label):
        published = _find_published(bucket, name.prefix)
    if published:
        folder, manifest = published
        objects = {
            entry.path: SnapshotFile(
                entry.path, _key(folder, entry.path), entry.size, entry.chunks, None, entry.sha256
            )
            for entry in manifest.files
        }
        return BucketOrigin(label, bucket, access, cache, server, objects, manifest)
    with explained(access, "listing", label):
        objects = dict(_list(bucket, name.prefix))
        others = [] if objects else [found.key for found in islice(bucket.list(""), _SHOWN)]
    if LATEST_NAME in objects:  # it can be listed, but was not to be read
        hidden = BucketError("", "AccessDenied")
        raise access.explain(hidden, "reading", bucket.url(_key(name.prefix, LATEST_NAME)))
    if not objects:
        seen = f"The bucket holds {', '.join(others)}, …" if others else "The bucket is empty."
        raise UsageError(f"There is nothing under {label}/. {seen} Check the folder's name.")
    return BucketOrigin(label, bucket, access, cache, server, objects)


@contextmanager
def explained(access: Access, doing: str, where: str) -> Iterator[None]:
    """Put what the weights room raises into a source's words."""
    try:
        yield
    except WeightsError as error:
        what = access.explain(error, doing, where)
        if what is error:
            raise
        raise what from error


def _find_published(bucket: Bucket, prefix: str) -> tuple[str, Manifest] | None:
    """The manifest of the version that is served, or of the version that `prefix` itself is, and its folder."""
    latest = _read(bucket, _key(prefix, LATEST_NAME), LATEST_LIMIT)
    folder = prefix
    if latest is not None:
        version = parse_latest(latest, bucket.url(_key(prefix, LATEST_NAME)))
        folder = _key(prefix, version)
    key = _key(folder, MANIFEST_NAME)
    data = _read(bucket, key, MANIFEST_LIMIT)
    if data is None and latest is not None:
        raise ManifestError(
            f"{bucket.url(_key(prefix, LATEST_NAME))} names a version whose manifest, {bucket.url(key)}, cannot be "
            "read. Publish the model again, or give the folder of another version"
        )
    if data is None or (latest is None and FORMAT.encode() not in data):
        return None  # other programs have manifests of their own
    manifest = parse_manifest(data, bucket.url(key))
    if latest is not None and manifest.version != version:
        raise ManifestError(
            f"{bucket.url(key)} is refused: it describes version {manifest.version}. Publish the model again"
        )
    return folder, manifest


def _read(bucket: Bucket, key: str, limit: int) -> bytes | None:
    try:
        return bucket.get(key, limit=limit)
    except BucketError as error:
        if error.is_missing_or_hidden:
            return None
        raise


def _list(bucket: Bucket, prefix: str) -> Iterator[tuple[str, SnapshotFile]]:
    """Every object under `prefix` by its path there; hidden ones, and those that only stand for a folder, left out."""
    start = f"{prefix}/" if prefix else ""
    for found in bucket.list(start):
        path = found.key.removeprefix(start)
        if path == "" or (path.endswith("/") and found.size == 0):
            continue
        parts = path.split("/")
        if any(part in ("", ".", "..") for part in parts) or "\\" in path or not path.isprintable():
            raise UsageError(
                f"Listing {bucket.url(prefix)}: the key {found.key!r} would lead out of the folder when it is written "
                "to a disk, or cannot be a file's name. Remove or rename that object."
            )
        if not any(part.startswith(".") for part in parts):
            yield path, SnapshotFile(path, found.key, found.size, None, found.etag)


def _key(prefix: str, path: str) -> str:
    return f"{prefix}/{path}" if prefix else path
