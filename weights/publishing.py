"""Publishing: a folder becomes an immutable version in the bucket, then the one that readers are told of.

Files first, then the manifest, then latest.json: a reader sees the old version or the new one, never a part. What
the bucket already holds is not sent again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from weights.bucket import Bucket
from weights.digests import Progress
from weights.errors import BucketError, ManifestError, ModelNotFoundError, OversizedError
from weights.folder import hash_folder
from weights.manifest import (
    LATEST_NAME,
    MANIFEST_NAME,
    FileEntry,
    Manifest,
    dump_latest,
    dump_manifest,
    make_manifest,
)
from weights.parallel import run_all
from weights.snapshot import read_latest, read_manifest
from weights.upload import FileUpload, copy_within, is_there

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Publication:
    """A plan: what one version holds, and what must be done so that the bucket serves it.

    `copies` pairs an entry with the key of an object in the bucket that has its bytes already.
    """

    bucket: Bucket
    folder: Path
    model_path: str
    manifest: Manifest
    manifest_is_there: bool
    uploads: tuple[FileEntry, ...]
    copies: tuple[tuple[FileEntry, str], ...]
    previous_version: str | None

    @property
    def version(self) -> str:
        return self.manifest.version

    @property
    def files(self) -> tuple[FileEntry, ...]:
        return self.manifest.files

    @property
    def unchanged(self) -> bool:
        """Whether the bucket already serves exactly this, so that `publish` has nothing to do."""
        return (
            self.manifest_is_there
            and self.previous_version == self.version
            and not self.uploads
            and not self.copies
        )

    @property
    def upload_bytes(self) -> int:
        return sum(entry.size for entry in self.uploads)

    @property
    def total_bytes(self) -> int:
        return self.manifest.total_bytes

    def key(self, path: str) -> str:
        return f"{self.model_path}/{self.version}/{path}"


def plan_publication(
    folder: Path,
    bucket: Bucket,
    model_path: str,
    recipe: Mapping[str, Any],
    *,
    repair: bool = False,
    jobs: int = 8,
    on_bytes: Progress | None = None,
) -> Publication:
    """Hash the folder and find out what the bucket lacks; writes nothing. `on_bytes` counts hashed bytes.

    An object that is there but is not the one that was published (other size, no or another SHA-256) counts as
    lacking: publishing again mends it. With `repair` all of them do, also what only looks right. Raises FolderError
    for what cannot be published, BucketError when the bucket cannot be asked.
    """
    manifest = make_manifest(hash_folder(folder, jobs=jobs, on_bytes=on_bytes), recipe)
    keys = [f"{model_path}/{manifest.version}/{entry.path}" for entry in manifest.files]
    previous = _served_version(bucket, model_path)
    there = [False] * len(keys)
    if not repair:
        looks = [
            partial(is_there, bucket, key, entry)
            for key, entry in zip(keys, manifest.files, strict=True)
        ]
        there = run_all(looks, jobs, name="look")
    lacking = [entry for entry, found in zip(manifest.files, there, strict=True) if not found]
    held = (
        _held_by(bucket, model_path, previous)
        if lacking and previous != manifest.version and not repair
        else {}
    )
    copies = [
        (entry, held[entry.sha256])
        for entry in lacking
        if entry.sha256 in held and is_there(bucket, held[entry.sha256], entry)
    ]
    copied = {entry.path for entry, _ in copies}
    return Publication(
        bucket=bucket,
        folder=folder,
        model_path=model_path,
        manifest=manifest,
        manifest_is_there=_has_manifest(bucket, model_path, manifest.version),
        uploads=tuple(entry for entry in lacking if entry.path not in copied),
        copies=tuple(copies),
        previous_version=previous,
    )


def publish(publication: Publication, *, jobs: int = 8, on_bytes: Progress | None = None) -> None:
    """Carry the plan out, with `jobs` requests at once. `on_bytes` counts the bytes the bucket has taken.

    Nothing a reader can see changes before the end. Raises BucketError, and FolderError when a file is no longer
    what was hashed.
    """
    if publication.unchanged:
        return
    bucket = publication.bucket
    uploads = [
        FileUpload(
            bucket, publication.folder / entry.path, publication.key(entry.path), entry, on_bytes
        )
        for entry in publication.uploads
    ]
    copies = [
        partial(copy_within, bucket, source, publication.key(entry.path), entry)
        for entry, source in publication.copies
    ]
    try:
        begin: list[Callable[[], None]] = [*copies, *(upload.begin for upload in uploads)]
        run_all(begin, jobs, name="publish")
        run_all((task for upload in uploads for task in upload.tasks()), jobs, name="publish")
        run_all((upload.complete for upload in uploads), jobs, name="publish")
    except BaseException:
        _abort(uploads)
        raise
    if not publication.manifest_is_there:
        bucket.put(
            publication.key(MANIFEST_NAME),
            dump_manifest(publication.manifest),
            content_type="application/json",
        )
    activate(bucket, publication.model_path, publication.version)


def activate(bucket: Bucket, model_path: str, version: str) -> None:
    """Make `version` the one readers get: re-point latest.json, if that version is really there.

    Raises ModelNotFoundError or ManifestError when it is not, BucketError when the bucket refuses.
    """
    read_manifest(bucket, model_path, version)
    bucket.put(f"{model_path}/{LATEST_NAME}", dump_latest(version), content_type="application/json")


def _served_version(bucket: Bucket, model_path: str) -> str | None:
    """The version readers get now; None also where latest.json is broken, since publishing is what mends it."""
    try:
        return read_latest(bucket, model_path)
    except (ManifestError, OversizedError) as error:
        logger.warning("%s", error)
        return None


def _has_manifest(bucket: Bucket, model_path: str, version: str) -> bool:
    try:
        read_manifest(bucket, model_path, version)
    except (ModelNotFoundError, ManifestError, OversizedError):
        return False
    return True


def _held_by(bucket: Bucket, model_path: str, version: str | None) -> dict[str, str]:
    """The keys of what an earlier version holds, by SHA-256; nothing where it cannot be read."""
    if version is None:
        return {}
    try:
        manifest = read_manifest(bucket, model_path, version)
    except (ModelNotFoundError, ManifestError, OversizedError) as error:
        logger.warning("publishing without reuse of the version before: %s", error)
        return {}
    return {entry.sha256: f"{model_path}/{version}/{entry.path}" for entry in manifest.files}


def _abort(uploads: Iterable[FileUpload]) -> None:
    for upload in uploads:
        try:
            upload.abort()
        except BucketError as error:
            # The failure that led here is raised; this one is only told, so that it does not hide it.
            logger.warning("%s", error)
