"""latest.json: pointing it at a version, by a person's decision or at the end of a publication.

A publication takes readers from the version it found active to its own. When somebody else has pointed latest.json
elsewhere meanwhile, that was a decision this run knew nothing of, so it stands.
"""

from __future__ import annotations

from weights.bucket import Bucket
from weights.errors import BucketError, ManifestError, OversizedError, OvertakenError
from weights.manifest import LATEST_NAME, dump_latest, parse_latest
from weights.snapshot import LATEST_LIMIT, read_manifest

_ATTEMPTS = 5
SOMEBODY_WAS_FASTER = frozenset({"PreconditionFailed", "ConditionalRequestConflict", "NoSuchKey"})
# What servers that know no conditions on writing answer; many others just ignore them.
NO_CONDITIONS = frozenset({"NotImplemented", "InvalidArgument", "InvalidRequest"})


def activate(bucket: Bucket, model_path: str, version: str) -> None:
    """Make `version` the one readers get, whatever it was before, if that version is really there.

    Raises ModelNotFoundError or ManifestError when it is not, BucketError when the bucket refuses.
    """
    read_manifest(bucket, model_path, version)
    _point(bucket, model_path, version)


def succeed(bucket: Bucket, model_path: str, version: str, previous: str | None) -> None:
    """Make `version` the one readers get, if `previous` still is; a no-op where `version` already is.

    The server is asked to compare once more as it writes. Raises OvertakenError, and what `activate` raises.
    """
    read_manifest(bucket, model_path, version)
    for _ in range(_ATTEMPTS):
        active, etag = _active(bucket, model_path)
        if active == version:
            return
        if active != previous:
            raise OvertakenError(
                f"version {version} of {model_path} is whole in bucket {bucket.name}, but not served: when this run "
                f"began, {LATEST_NAME} named {previous or 'no version'}, and meanwhile somebody else has made it name "
                f"{active or 'no version'}, so it was left at that. If {version} should be served after all: "
                f"`python -m weights activate {model_path} {version}`"
            )
        try:
            _point(bucket, model_path, version, etag)
        except BucketError as error:
            if error.code in SOMEBODY_WAS_FASTER:
                continue
            if error.code not in NO_CONDITIONS:
                raise
            _point(bucket, model_path, version)
        return
    raise BucketError(
        f"cannot write {bucket.url(f'{model_path}/{LATEST_NAME}')}: others keep changing it. Version {version} is "
        f"whole in the bucket: `python -m weights activate {model_path} {version}` serves it"
    )


_ABSENT = ""


def _active(bucket: Bucket, model_path: str) -> tuple[str | None, str | None]:
    """The version that latest.json names, None where it names none, and its ETag: "" where there is no such object,
    None where it has none or is too large to be read."""
    key = f"{model_path}/{LATEST_NAME}"
    try:
        found = bucket.reader.get_if_changed(key, None, limit=LATEST_LIMIT)
    except OversizedError:
        return None, None
    except BucketError as error:
        if error.is_missing_or_hidden:
            return None, _ABSENT
        raise
    if found is None:
        return None, None
    try:
        return parse_latest(found.data, bucket.url(key)), found.etag
    except ManifestError:
        return None, found.etag  # it is mended by writing it anew


def _point(bucket: Bucket, model_path: str, version: str, etag: str | None = None) -> None:
    bucket.put(
        f"{model_path}/{LATEST_NAME}",
        dump_latest(version),
        content_type="application/json",
        only_over=etag,
    )
