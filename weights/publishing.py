"""Publishing: a folder becomes an immutable version in the bucket, then the one that readers are told of.

Files first, then the manifest, then latest.json: a reader sees the old version or the new one, never a part. What
the bucket already holds is not sent again. A run that is killed leaves what the next one goes on from.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from weights.activation import succeed
from weights.bucket import Bucket
from weights.difference import Difference, difference
from weights.digests import Progress
from weights.errors import (
    BucketError,
    FolderError,
    ManifestError,
    ModelNotFoundError,
    OversizedError,
)
from weights.folder import hash_folder
from weights.held import held_by_others
from weights.manifest import MANIFEST_NAME, FileEntry, Manifest, dump_manifest, make_manifest
from weights.parallel import run_all
from weights.provenance import write_provenance
from weights.remembered import Remembered
from weights.snapshot import read_latest, read_manifest
from weights.unfinished import SILENCE_OF_THE_DEAD, Resumption, abort_leftovers
from weights.upload import FileUpload, copy_within, is_there

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Publication:
    """A plan: what one version holds, and what must be done so that the bucket serves it.

    `copies` pairs an entry with the key of an object in the bucket that has its bytes already. `previous` is the
    manifest of the version served when the plan was made, None where there is none that can be read. `part_digests`
    are the SHA-256s of parts, by a file's path, as far as they are known.
    """

    bucket: Bucket
    folder: Path
    model_path: str
    manifest: Manifest
    manifest_is_there: bool
    uploads: tuple[FileEntry, ...]
    copies: tuple[tuple[FileEntry, str], ...]
    previous_version: str | None
    previous: Manifest | None = None
    provenance: Mapping[str, Any] | None = None
    part_digests: Mapping[str, Sequence[str]] = field(default_factory=dict, repr=False)

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

    @property
    def difference(self) -> Difference | None:
        """How it differs from the version before; None where there is none to compare with."""
        return difference(self.previous, self.manifest) if self.previous else None

    def key(self, path: str) -> str:
        return f"{self.model_path}/{self.version}/{path}"


def plan_publication(
    folder: Path,
    bucket: Bucket,
    model_path: str,
    recipe: Mapping[str, Any],
    *,
    provenance: Mapping[str, Any] | None = None,
    remembered: Remembered | None = None,
    repair: bool = False,
    jobs: int = 8,
    on_bytes: Progress | None = None,
) -> Publication:
    """Hash the folder and find out what the bucket lacks; writes nothing there. `on_bytes` counts hashed bytes.

    An object that is there but is not the one that was published (other size, no or another SHA-256) counts as
    lacking: publishing again mends it. With `repair` all of them do, also what only looks right, and nothing is taken
    as hashed that is only `remembered`. Raises FolderError for what cannot be published, BucketError when the bucket
    cannot be asked.
    """
    active = _served_version(bucket, model_path)
    previous = _manifest_of(bucket, model_path, active)
    served = {entry.path: entry for entry in previous.files} if previous and not repair else {}
    still_there: dict[FileEntry, bool] = {}
    part_digests: dict[str, tuple[str, ...]] = {}

    def look_at_served(entry: FileEntry) -> None:
        """While others are being hashed: most often nothing has changed, and all looks are done when they are."""
        if entry == served.get(entry.path):
            still_there[entry] = is_there(bucket, f"{model_path}/{active}/{entry.path}", entry)

    entries = hash_folder(
        folder,
        jobs=jobs,
        on_bytes=on_bytes,
        on_entry=look_at_served,
        on_parts=part_digests.__setitem__,
        remembered=None if repair else remembered,
        known=served,
    )
    manifest = make_manifest(entries, recipe)
    version = manifest.version

    def look(entry: FileEntry) -> bool:
        if version == active and entry in still_there:
            return still_there[entry]
        return is_there(bucket, f"{model_path}/{version}/{entry.path}", entry)

    there = [False] * len(manifest.files)
    if not repair:
        there = run_all([partial(look, entry) for entry in manifest.files], jobs, name="look")
    lacking = [entry for entry, found in zip(manifest.files, there, strict=True) if not found]
    copies: dict[str, str] = {}
    if lacking and not repair:
        held = held_by_others(bucket, model_path, version, active, jobs=jobs)
        searches = [partial(_source_of, bucket, entry, held) for entry in lacking]
        sources = run_all(searches, jobs, name="look")
        copies = {
            entry.path: key for entry, key in zip(lacking, sources, strict=True) if key is not None
        }
    own = previous if active == version else _manifest_of(bucket, model_path, version)
    return Publication(
        bucket=bucket,
        folder=folder,
        model_path=model_path,
        manifest=manifest,
        manifest_is_there=own is not None,
        uploads=tuple(entry for entry in lacking if entry.path not in copies),
        copies=tuple((entry, copies[entry.path]) for entry in lacking if entry.path in copies),
        previous_version=active,
        previous=previous,
        provenance=provenance,
        part_digests=part_digests,
    )


def publish(publication: Publication, *, jobs: int = 8, on_bytes: Progress | None = None) -> None:
    """Carry the plan out, with `jobs` requests at once. `on_bytes` counts the bytes the bucket has taken.

    Nothing a reader can see changes before the end. Raises BucketError, FolderError when a file is no longer what
    was hashed, and OvertakenError when somebody else has changed meanwhile which version is served.
    """
    bucket, model_path, version = publication.bucket, publication.model_path, publication.version
    _bring(publication, jobs, on_bytes)
    _put_away_leftovers(bucket, model_path, version)
    if publication.unchanged:
        return
    if not publication.manifest_is_there:
        _bring_again(publication, jobs)
        if publication.provenance is not None:
            write_provenance(bucket, model_path, version, publication.provenance)
        bucket.put(
            publication.key(MANIFEST_NAME),
            dump_manifest(publication.manifest),
            content_type="application/json",
        )
    succeed(bucket, model_path, version, publication.previous_version)


def _bring(publication: Publication, jobs: int, on_bytes: Progress | None) -> None:
    """Have every file of the version in the bucket."""
    resumption = Resumption(publication.bucket)

    def upload_of(entry: FileEntry, on_bytes: Progress | None) -> FileUpload:
        return FileUpload(
            publication.bucket,
            publication.folder / entry.path,
            publication.key(entry.path),
            entry,
            resumption,
            on_bytes,
            publication.part_digests.get(entry.path),
        )

    def copy(entry: FileEntry, source: str) -> None:
        key = publication.key(entry.path)
        try:
            copy_within(publication.bucket, source, key, entry)
        except BucketError as error:
            if is_there(publication.bucket, key, entry):
                return  # another run of the same version was faster
            if not error.is_missing_or_hidden:
                raise
            # The version it was to be copied from has been pruned since the plan was made.
            for task in upload_of(entry, None).tasks():
                task()

    uploads = [upload_of(entry, on_bytes) for entry in publication.uploads]
    tasks: list[Callable[[], None]] = [
        partial(copy, entry, source) for entry, source in publication.copies
    ]
    tasks += [task for upload in uploads for task in upload.tasks()]
    try:
        run_all(tasks, jobs, name="publish")
    except BaseException as error:
        if _is_final(error):
            _abort(uploads)
        raise


def _bring_again(publication: Publication, jobs: int) -> None:
    """Send what was there when the plan was made and is no longer: without a manifest, somebody may have pruned it."""
    entries = publication.files
    looks = [
        partial(is_there, publication.bucket, publication.key(entry.path), entry)
        for entry in entries
    ]
    there = run_all(looks, jobs, name="look")
    gone = tuple(entry for entry, found in zip(entries, there, strict=True) if not found)
    if gone:
        _bring(replace(publication, uploads=gone, copies=()), jobs, None)


def _is_final(error: BaseException) -> bool:
    """Whether running again would fail as well: then no parts are kept for it."""
    if isinstance(error, BucketError):
        return error.code == "AccessDenied"
    return isinstance(error, FolderError)


def _served_version(bucket: Bucket, model_path: str) -> str | None:
    """The version readers get now; None also where latest.json is broken, since publishing is what mends it."""
    try:
        return read_latest(bucket, model_path)
    except (ManifestError, OversizedError) as error:
        logger.warning("%s", error)
        return None


def _manifest_of(bucket: Bucket, model_path: str, version: str | None) -> Manifest | None:
    """The version's manifest; None where there is none that can be read."""
    if version is None:
        return None
    try:
        return read_manifest(bucket, model_path, version)
    except (ModelNotFoundError, ManifestError, OversizedError):
        return None


def _source_of(bucket: Bucket, entry: FileEntry, held: Mapping[str, Iterable[str]]) -> str | None:
    """The key of an object with the entry's bytes that really is there."""
    return next((key for key in held.get(entry.sha256, ()) if is_there(bucket, key, entry)), None)


def _put_away_leftovers(bucket: Bucket, model_path: str, version: str) -> None:
    """Parts cost their owner money and nobody sees them; but that they stay is no reason to fail."""
    try:
        abort_leftovers(bucket, model_path, whole=version, silence=SILENCE_OF_THE_DEAD)
    except BucketError as error:
        logger.info("what interrupted runs may have left is not put away: %s", error)


def _abort(uploads: Iterable[FileUpload]) -> None:
    for upload in uploads:
        try:
            upload.abort()
        except BucketError as error:
            # The failure that led here is raised; this one is only told, so that it does not hide it.
            logger.warning("%s", error)
