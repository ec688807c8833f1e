"""What models and versions a bucket holds: for people, and the only part of this room that needs to list."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from weights.artifacts import ARTIFACTS_FOLDER
from weights.bucket import Bucket
from weights.errors import ManifestError, ModelNotFoundError, OversizedError
from weights.manifest import LATEST_NAME, MANIFEST_NAME, is_version
from weights.provenance import read_provenance
from weights.snapshot import read_latest, read_manifest

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class VersionInfo:
    """One published version; `problem` says why its manifest is refused, and size and source are then unknown.

    `provenance` is what was written down about how it came about, None where nothing was; `compiled` are the keys that
    compiled code is published under.
    """

    model_path: str
    version: str
    active: bool
    published: datetime
    bytes: int | None
    source: dict[str, Any] | None
    provenance: dict[str, Any] | None
    problem: str | None
    compiled: tuple[str, ...] = ()


def list_models(bucket: Bucket) -> list[str]:
    """The paths of the models that have a latest.json, sorted. Raises BucketError (this needs s3:ListBucket)."""
    suffix = f"/{LATEST_NAME}"
    return sorted(
        found.key.removesuffix(suffix) for found in bucket.list("") if found.key.endswith(suffix)
    )


def list_versions(bucket: Bucket, model_path: str) -> list[VersionInfo]:
    """The versions of one model, newest first. Raises ModelNotFoundError when there is none, BucketError."""
    try:
        active = read_latest(bucket, model_path)
    except (ManifestError, OversizedError) as error:  # the list is what is needed to mend it
        logger.warning("%s", error)
        active = None
    versions = sorted(
        _versions(bucket, model_path, active), key=lambda found: found.published, reverse=True
    )
    if not versions:
        raise ModelNotFoundError(
            f"no version of {model_path!r} is published in bucket {bucket.name}. "
            "`python -m weights ls` lists the models there are"
        )
    return versions


def _versions(bucket: Bucket, model_path: str, active: str | None) -> Iterator[VersionInfo]:
    manifests = []
    compiled = defaultdict(list)
    for found in bucket.list(f"{model_path}/"):
        version, _, name = found.key.removeprefix(f"{model_path}/").partition("/")
        if not is_version(version):
            continue
        match name.split("/"):
            case [only] if only == MANIFEST_NAME:
                manifests.append((version, found))
            case [folder, key, last] if (folder, last) == (ARTIFACTS_FOLDER, MANIFEST_NAME):
                compiled[version].append(key)
    for version, found in manifests:
        size = source = problem = None
        try:
            manifest = read_manifest(bucket, model_path, version)
        except (ManifestError, ModelNotFoundError, OversizedError) as error:
            problem = str(error)
        else:
            size = manifest.total_bytes
            found_source = manifest.recipe.get("source")
            source = found_source if isinstance(found_source, dict) else None
        yield VersionInfo(
            model_path,
            version,
            version == active,
            found.modified,
            size,
            source,
            read_provenance(bucket, model_path, version),
            problem,
            tuple(compiled[version]),
        )
