"""Deleting old versions of a model: which ones is decided from a listing, then they go, each one's manifest first.

Without its manifest a version cannot be begun to be read. One that is being read at that moment is not waited for:
its reader fails, says so, and finds the active version when it starts again. The active version never goes.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial

from weights.bucket import Bucket, ObjectInfo
from weights.errors import BucketError, ModelNotFoundError
from weights.manifest import LATEST_NAME, MANIFEST_NAME, is_version
from weights.parallel import run_all
from weights.snapshot import read_latest
from weights.unfinished import SILENCE_BEFORE_PRUNING, abort_leftovers

# Files without a manifest are a publication that is under way, or what is left of one that was killed: it is the
# latter when nothing has been written for this long.
_UNPUBLISHED_FOR = timedelta(days=1)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StoredVersion:
    """The objects of one version; `published` is None for files that have no manifest."""

    version: str
    objects: tuple[ObjectInfo, ...]
    published: datetime | None

    @property
    def bytes(self) -> int:
        return sum(found.size for found in self.objects)

    @property
    def written(self) -> datetime:
        return max(found.modified for found in self.objects)


@dataclass(frozen=True)
class Pruning:
    """What is to go, oldest first, and what stays, newest first."""

    bucket: Bucket
    model_path: str
    deleted: tuple[StoredVersion, ...]
    kept: tuple[str, ...]

    @property
    def bytes(self) -> int:
        return sum(found.bytes for found in self.deleted)


def plan_pruning(
    bucket: Bucket, model_path: str, keep: int, *, also: Collection[str] = ()
) -> Pruning:
    """Find all but the `keep` newest versions, the active one and those of `also`, if only just published or about
    to be; deletes nothing.

    Raises ModelNotFoundError when there is no version at all, ManifestError when latest.json does not tell which one
    is active, and BucketError (this needs s3:ListBucket).
    """
    active = _served(bucket, model_path)
    stored = list(_stored(bucket, model_path))
    if not also and not any(found.published for found in stored):
        raise ModelNotFoundError(
            f"no version of {model_path!r} is published in bucket {bucket.name}. "
            "`python -m weights ls` lists the models there are"
        )
    kept, deleted = choose(stored, keep, active, datetime.now(UTC), also=also)
    return Pruning(bucket, model_path, deleted, kept)


def choose(
    stored: Iterable[StoredVersion],
    keep: int,
    active: str | None,
    now: datetime,
    *,
    also: Collection[str] = (),
) -> tuple[tuple[str, ...], tuple[StoredVersion, ...]]:
    """The names of the versions that stay, newest first, and the versions that go, oldest first.

    What `also` names stays; where it is not stored yet, it will be the newest, and active in the place of `active`.
    """
    # S3 tells times in whole seconds: of two versions of one second, the active one is the newer.
    stored = sorted(
        stored,
        key=lambda found: (
            found.published or found.written,
            found.version == active,
            found.version,
        ),
    )
    published = [found.version for found in stored if found.published]
    coming = [version for version in also if version not in published]
    published += coming
    kept = {*published[-keep:], *also, *(() if coming else (active,))}
    deleted = [
        found
        for found in stored
        if found.version not in kept and (found.published or found.written < now - _UNPUBLISHED_FOR)
    ]
    return tuple(version for version in reversed(published) if version in kept), tuple(deleted)


def prune(pruning: Pruning, *, jobs: int = 8) -> tuple[StoredVersion, ...]:
    """Delete what the plan names, and the parts of uploads that nobody will finish; returns the versions that went.

    A version that was made the active one meanwhile stays. Raises BucketError; what remains goes with the next run.
    """
    bucket, model_path = pruning.bucket, pruning.model_path
    gone = []
    for found in pruning.deleted:
        if _served(bucket, model_path) == found.version:
            continue
        manifest = f"{model_path}/{found.version}/{MANIFEST_NAME}"
        if found.published:
            bucket.delete(manifest)
        keys = [stored.key for stored in found.objects if stored.key != manifest]
        run_all([partial(bucket.delete, key) for key in keys], jobs, name="delete")
        gone.append(found)
    try:
        abort_leftovers(bucket, model_path, silence=SILENCE_BEFORE_PRUNING)
    except BucketError as error:
        logger.warning("what interrupted runs may have left is not put away: %s", error)
    return tuple(gone)


def _served(bucket: Bucket, model_path: str) -> str | None:
    """The version that is served, None only where the listing too says that there is no latest.json.

    Raises BucketError where it is there and hidden: what it names must not go.
    """
    active = read_latest(bucket, model_path)
    latest = f"{model_path}/{LATEST_NAME}"
    if active is None and any(found.key == latest for found in bucket.list(latest)):
        raise BucketError(
            f"cannot read {bucket.url(latest)}, so which version is served is not known, and nothing more is deleted. "
            "Allow s3:GetObject on it",
            "AccessDenied",
        )
    return active


def _stored(bucket: Bucket, model_path: str) -> Iterable[StoredVersion]:
    by_version: dict[str, list[ObjectInfo]] = defaultdict(list)
    for found in bucket.list(f"{model_path}/"):
        version = found.key.removeprefix(f"{model_path}/").partition("/")[0]
        if is_version(version):
            by_version[version].append(found)
    for version, objects in by_version.items():
        manifest = f"{model_path}/{version}/{MANIFEST_NAME}"
        published = next((found.modified for found in objects if found.key == manifest), None)
        yield StoredVersion(version, tuple(objects), published)
