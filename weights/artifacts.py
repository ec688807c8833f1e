"""What was made of a version for one kind of machine, such as compiled code: published beside its files, fetched whole.

To this room it is named bytes under a key. A manifest, written last, says how many they are and what their digests are,
and nothing is handed out that differs. It is no part of the version, which serves as well without.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, Field, ValidationError

from weights.bucket import Bucket
from weights.chunks import CHUNK_SIZE, chunk_count
from weights.digests import chunk_digest
from weights.errors import (
    BucketError,
    CorruptObjectError,
    ManifestError,
    OversizedError,
    WeightsError,
)
from weights.manifest import MANIFEST_NAME, Fields, FileEntry, check_recipe, is_version

FORMAT: Final = "lightning-in-a-bucket/artifacts/1"
# Hidden files are never published, so no file of a model can lie in a folder called this.
ARTIFACTS_FOLDER = ".compiled"
MANIFEST_LIMIT = 1024 * 1024  # bytes
BLOB_LIMIT = 2 * 1024**3  # bytes, all of one key together
AGAIN = "Run scripts/compile_model.py again on a machine of this kind"
_KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,254}")

logger = logging.getLogger(__name__)


def _check_key(key: str) -> str:
    if not _KEY.fullmatch(key):
        raise ValueError(
            f"{key!r} is not a key: up to 255 letters, digits, dots, hyphens and underscores"
        )
    return key


class ArtifactsManifest(Fields):
    """What lies under one key. `about` is for whoever made it to say what it is, and opaque here."""

    format: Literal["lightning-in-a-bucket/artifacts/1"] = FORMAT
    version: str = Field(pattern=r"^[0-9a-f]{32}$")
    key: Annotated[str, AfterValidator(_check_key)]
    files: tuple[FileEntry, ...] = Field(min_length=1, max_length=64)
    about: Annotated[dict[str, Any], AfterValidator(check_recipe)]

    @property
    def total_bytes(self) -> int:
        return sum(entry.size for entry in self.files)


@dataclass(frozen=True)
class Artifacts:
    """Verified bytes by their names, and what their manifest says about them."""

    blobs: Mapping[str, bytes]
    about: Mapping[str, Any]

    @property
    def total_bytes(self) -> int:
        return sum(map(len, self.blobs.values()))


def publish_artifacts(
    bucket: Bucket,
    model_path: str,
    version: str,
    key: str,
    blobs: Mapping[str, bytes],
    about: Mapping[str, Any],
) -> ArtifactsManifest:
    """Put the blobs beside a published version, in the place of what is there under this key; a reader sees either.

    What was there before stays in the bucket, under names of its own, for those who have just read its manifest; it
    goes with the version. Raises ManifestError for what cannot be published, BucketError.
    """
    try:
        entries = tuple(_entry(name, data) for name, data in sorted(blobs.items()))
        manifest = ArtifactsManifest(version=version, key=key, files=entries, about=dict(about))
    except (ValidationError, ValueError, TypeError) as error:
        raise ManifestError(
            f"artifacts {key!r} of version {version} cannot be published: {error}"
        ) from None
    place = _place(model_path, version, key)
    for entry in entries:
        bucket.put(
            f"{place}/{entry.path}",
            blobs[_name(entry)],
            content_type="application/octet-stream",
        )
    document = json.dumps(manifest.model_dump(mode="json"), indent=1, sort_keys=True).encode()
    bucket.put(f"{place}/{MANIFEST_NAME}", document + b"\n", content_type="application/json")
    return manifest


def fetch_artifacts(
    bucket: Bucket,
    model_path: str,
    version: str,
    key: str,
    *,
    only: Collection[str] | None = None,
) -> Artifacts | None:
    """What is published under this key, every byte verified, or None. With `only`, these SHA-256s and no others.

    Where there is something that cannot be used, the log says which object and what to do. Never raises a WeightsError:
    nobody needs artifacts to serve.
    """
    try:
        found = read_artifacts(bucket, model_path, version, key, only=only)
    except WeightsError as error:
        logger.warning("compiled code is not used: %s", error)
        return None
    if found is None:
        logger.info("no compiled code for %s: scripts/compile_model.py publishes it", key)
    return found


def read_artifacts(
    bucket: Bucket,
    model_path: str,
    version: str,
    key: str,
    *,
    only: Collection[str] | None = None,
) -> Artifacts | None:
    """As `fetch_artifacts`, but raises what is wrong: ManifestError, CorruptObjectError, BucketError."""
    if not is_version(version):
        return None  # a bare folder
    place = _place(model_path, version, key)
    where = bucket.url(f"{place}/{MANIFEST_NAME}")
    try:
        document = bucket.get(f"{place}/{MANIFEST_NAME}", limit=MANIFEST_LIMIT)
    except BucketError as error:
        if error.is_missing_or_hidden:
            return None
        raise
    manifest = _parsed(document, where)
    if (manifest.version, manifest.key) != (version, key):
        raise ManifestError(
            f"{where} is refused: it is about {manifest.key} of version {manifest.version}. {AGAIN}"
        )
    if manifest.total_bytes > BLOB_LIMIT:
        raise ManifestError(
            f"{where} is refused: {manifest.total_bytes} bytes are more than make sense. {AGAIN}"
        )
    for entry in manifest.files:
        if only is not None and entry.sha256 not in only:
            raise ManifestError(
                f"{where} is refused: the SHA-256 of {_name(entry)}, {entry.sha256}, is none of those allowed here. "
                "Find out who published it; if it is right, allow it in COMPILED_SHA256"
            )
    blobs = {
        _name(entry): _verified(bucket, f"{place}/{entry.path}", entry) for entry in manifest.files
    }
    return Artifacts(blobs, manifest.about)


def list_artifacts(bucket: Bucket, model_path: str, version: str) -> Iterator[str]:
    """The keys under which there is something for a version. Raises BucketError (this needs s3:ListBucket)."""
    place = f"{model_path}/{version}/{ARTIFACTS_FOLDER}/"
    for found in bucket.list(place):
        key, _, name = found.key.removeprefix(place).partition("/")
        if name == MANIFEST_NAME:
            yield key


def verify_artifacts(bucket: Bucket, model_path: str, version: str) -> tuple[int, list[str]]:
    """How many keys a version has artifacts under, and what is wrong with them.

    Without s3:ListBucket nothing can be found, and nothing is said. Raises BucketError.
    """
    try:
        keys = list(list_artifacts(bucket, model_path, version))
    except BucketError as error:
        if error.code != "AccessDenied":
            raise
        return 0, []
    problems = []
    for key in keys:
        try:
            read_artifacts(bucket, model_path, version, key)
        except (ManifestError, CorruptObjectError, OversizedError) as error:
            problems.append(str(error))
        except BucketError as error:
            if error.code != "NoSuchKey":
                raise  # nothing is known of bytes that could not be read
            problems.append(str(error))
    return len(keys), problems


def _place(model_path: str, version: str, key: str) -> str:
    return f"{model_path}/{version}/{ARTIFACTS_FOLDER}/{_check_key(key)}"


def _entry(name: str, data: bytes) -> FileEntry:
    """Under a path that its content gives it, so that no blob is ever overwritten by another."""
    digest = hashlib.sha256(data).hexdigest()
    return FileEntry(
        path=f"{digest[:32]}/{name}", size=len(data), sha256=digest, chunks=_chunk_digests(data)
    )


def _name(entry: FileEntry) -> str:
    return entry.path.partition("/")[2]


def _chunk_digests(data: bytes) -> tuple[str, ...]:
    view = memoryview(data)
    starts = range(0, chunk_count(len(data)) * CHUNK_SIZE, CHUNK_SIZE)
    return tuple(chunk_digest([view[start : start + CHUNK_SIZE]]) for start in starts)


def _parsed(document: bytes, where: str) -> ArtifactsManifest:
    try:
        return ArtifactsManifest.model_validate(json.loads(document))
    except ValidationError as error:
        found = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(part) for part in found["loc"])
        problem = f"{place}: {found['msg']}"[:1000]
    except (ValueError, RecursionError) as error:
        problem = f"it is not valid JSON ({error})"
    raise ManifestError(f"{where} is refused: {problem}. {AGAIN}")


def _verified(bucket: Bucket, key: str, entry: FileEntry) -> bytes:
    try:
        data = bucket.get(key, limit=entry.size)
    except OversizedError:
        raise CorruptObjectError(
            f"{bucket.url(key)} has more than the {entry.size} bytes that were published. {AGAIN}"
        ) from None
    except BucketError as error:
        if error.is_missing_or_hidden:
            raise BucketError(f"{error}. Its manifest is there. {AGAIN}", error.code) from error
        raise
    if len(data) != entry.size:
        raise CorruptObjectError(
            f"{bucket.url(key)} has {len(data)} bytes where {entry.size} were published. {AGAIN}"
        )
    if hashlib.sha256(data).hexdigest() != entry.sha256 or _chunk_digests(data) != entry.chunks:
        raise CorruptObjectError(
            f"{bucket.url(key)} is not what was published: its digest differs. {AGAIN}"
        )
    return data
