"""What the other versions of a model hold, by SHA-256: bytes the bucket can copy instead of taking them anew."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial

from weights.bucket import Bucket
from weights.errors import BucketError, ManifestError, ModelNotFoundError, OversizedError
from weights.manifest import Manifest, is_version
from weights.parallel import run_all
from weights.snapshot import read_manifest

logger = logging.getLogger(__name__)


def held_by_others(
    bucket: Bucket, model_path: str, version: str, active: str | None, *, jobs: int
) -> Mapping[str, Sequence[str]]:
    """The keys under which versions other than `version` hold a file, by its SHA-256; the active version's come first.

    Without s3:ListBucket only the active version is known. Raises BucketError when the bucket cannot be asked.
    """
    versions = [
        found for found in _published(bucket, model_path, active) if found not in (version, active)
    ]
    if active is not None and active != version:
        versions.insert(0, active)
    reads = [partial(_manifest, bucket, model_path, found) for found in versions]
    held: dict[str, list[str]] = defaultdict(list)
    for manifest in run_all(reads, jobs, name="manifest"):
        if manifest is None:
            continue
        for entry in manifest.files:
            held[entry.sha256].append(f"{model_path}/{manifest.version}/{entry.path}")
    return held


def _published(bucket: Bucket, model_path: str, active: str | None) -> list[str]:
    try:
        return [name for name in bucket.folders(f"{model_path}/") if is_version(name)]
    except BucketError as error:
        if error.code != "AccessDenied":
            raise
        reused = (
            f"only version {active}, which is active, is" if active else "no earlier version is"
        )
        logger.warning("%s looked through for files that need not be sent again: %s", reused, error)
        return []


def _manifest(bucket: Bucket, model_path: str, version: str) -> Manifest | None:
    try:
        return read_manifest(bucket, model_path, version)
    except ModelNotFoundError:
        return None  # a publication that is under way, or never ended
    except (ManifestError, OversizedError) as error:
        logger.warning("publishing without reuse of version %s: %s", version, error)
        return None
