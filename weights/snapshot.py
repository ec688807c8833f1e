"""What is there to read: one version of one model, found by name in the bucket.

A published version is described by its manifest and found without listing anything. A bare diffusers folder, as
older templates uploaded it, is listed, and carries no digests. Both become the same `Snapshot`.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weights.bucket import Bucket, ObjectInfo
from weights.chunks import CONFIG_SUFFIXES, SnapshotFile
from weights.errors import BucketError, ManifestError, ModelNotFoundError, WeightsError
from weights.manifest import (
    LATEST_NAME,
    MANIFEST_NAME,
    Manifest,
    check_path,
    is_pickle,
    is_version,
    parse_latest,
    parse_manifest,
)

LATEST_LIMIT = 64 * 1024  # bytes
MANIFEST_LIMIT = 64 * 1024 * 1024  # bytes; about a million chunks, 16 TB of model

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Snapshot:
    """One readable version of a model. `manifest` is None for a bare folder, whose bytes cannot be verified.

    `folder` is where its files lie on this disk, to be read before the bucket is asked; None where they do not.
    """

    model_path: str
    version: str
    files: tuple[SnapshotFile, ...]
    manifest: Manifest | None
    folder: Path | None = None

    @property
    def recipe(self) -> Mapping[str, Any] | None:
        return self.manifest.recipe if self.manifest else None

    @property
    def verifiable(self) -> bool:
        return self.manifest is not None

    @property
    def total_bytes(self) -> int:
        return sum(file.size for file in self.files)


def find_snapshot(bucket: Bucket, model_path: str, version: str | None = None) -> Snapshot:
    """Find the version `version` of a model, or the one latest.json names, or a bare folder.

    Raises ModelNotFoundError when there is none, ManifestError when what is there is not to be trusted, BucketError
    when the bucket cannot be read.
    """
    if version is None:
        version = read_latest(bucket, model_path)
    if version is None:
        return _bare_folder(bucket, model_path)
    return published_snapshot(model_path, read_manifest(bucket, model_path, version))


def published_snapshot(model_path: str, manifest: Manifest, folder: Path | None = None) -> Snapshot:
    """What a manifest describes, under the keys that it was published with."""
    prefix = f"{model_path}/{manifest.version}"
    files = tuple(
        SnapshotFile(
            entry.path, f"{prefix}/{entry.path}", entry.size, entry.chunks, None, entry.sha256
        )
        for entry in manifest.files
    )
    return Snapshot(model_path, manifest.version, files, manifest, folder)


def read_latest(bucket: Bucket, model_path: str) -> str | None:
    """The version that latest.json names; None when there is no latest.json to be seen."""
    key = f"{model_path}/{LATEST_NAME}"
    try:
        data = bucket.get(key, limit=LATEST_LIMIT)
    except BucketError as error:
        if error.is_missing_or_hidden:
            return None
        raise
    return parse_latest(data, bucket.url(key))


def read_manifest(bucket: Bucket, model_path: str, version: str) -> Manifest:
    """Read and check the manifest of one version. Raises ModelNotFoundError, ManifestError, BucketError."""
    if not is_version(version):
        raise ModelNotFoundError(
            f"{version!r} is not a version's name (32 hexadecimal digits). "
            f"`python -m weights ls {model_path}` lists the versions there are"
        )
    key = f"{model_path}/{version}/{MANIFEST_NAME}"
    try:
        data = bucket.get(key, limit=MANIFEST_LIMIT)
    except BucketError as error:
        if not error.is_missing_or_hidden:
            raise
        raise ModelNotFoundError(
            f"version {version} of {model_path} is not in bucket {bucket.name}, or may not be read: {error}. "
            f"`python -m weights ls {model_path}` lists the versions there are"
        ) from error
    manifest = parse_manifest(data, bucket.url(key))
    if manifest.version != version:
        raise ManifestError(
            f"{bucket.url(key)} is refused: it describes version {manifest.version}. Publish the model again"
        )
    return manifest


def _bare_folder(bucket: Bucket, model_path: str) -> Snapshot:
    index_key = f"{model_path}/model_index.json"
    try:
        index = json.loads(bucket.get(index_key, limit=LATEST_LIMIT))
    except BucketError as error:
        if not error.is_missing_or_hidden:
            raise
        raise ModelNotFoundError(
            f"there is no model {model_path!r} in bucket {bucket.name}, or this keypair may not read it: neither "
            f"{LATEST_NAME} nor model_index.json can be read under {bucket.url(model_path)}/ ({error}). Check "
            "MODEL_PATH and MODEL_BUCKET_NAME, or publish it with scripts/prepare_model.py"
        ) from error
    except (ValueError, RecursionError) as error:
        raise ManifestError(f"{bucket.url(index_key)} is not valid JSON ({error})") from None
    if not isinstance(index, dict):
        raise ManifestError(f"{bucket.url(index_key)} is not a JSON object")
    try:
        found = list(bucket.list(f"{model_path}/"))
    except BucketError as error:
        raise WeightsError(
            f"{bucket.url(model_path)}/ is a bare folder without a manifest, so it must be listed, and: {error}. "
            "Allow s3:ListBucket to the keypair, or publish the model with scripts/prepare_model.py, "
            "which needs no listing"
        ) from error
    components = {name for name in index if not name.startswith("_")}
    files = tuple(_needed_files(bucket, model_path, components, found))
    logger.warning(
        "%s/ is a bare folder: its bytes are checked by size and ETag only, since it carries no digests. "
        "Publish it with scripts/prepare_model.py to have every byte verified",
        bucket.url(model_path),
    )
    return Snapshot(model_path, _folder_version(files), files, None)


def _needed_files(
    bucket: Bucket, model_path: str, components: set[str], found: Iterable[ObjectInfo]
) -> Iterator[SnapshotFile]:
    """The files a pipeline is built from: the components' configs and safetensors, the fp16 variant if both are."""
    by_path = {
        path: info
        for info in found
        if (path := info.key.removeprefix(f"{model_path}/"))
        and (path == "model_index.json" or path.split("/")[0] in components)
    }
    weights = [path for path in by_path if path.endswith(".safetensors")]
    for component in sorted(components):
        pickles = [path for path in by_path if path.startswith(f"{component}/") and is_pickle(path)]
        if pickles and not any(path.startswith(f"{component}/") for path in weights):
            raise WeightsError(
                f"{bucket.url(f'{model_path}/{pickles[0]}')} may hold a pickle, which is never opened, and "
                f"{component}/ has no safetensors beside it. Publish the model again with scripts/prepare_model.py"
            )
    unwanted = set(_other_variants(weights))
    for path, info in sorted(by_path.items()):
        if path in unwanted or not path.endswith((".safetensors", *CONFIG_SUFFIXES)):
            continue
        try:
            check_path(path)
        except ValueError as error:
            raise WeightsError(f"{bucket.url(info.key)} is refused: {error}") from None
        yield SnapshotFile(path, info.key, info.size, None, info.etag)


def _other_variants(weights: Iterable[str]) -> Iterator[str]:
    """Of components that are there in several precisions, the paths that are not the fp16 one."""
    by_folder: dict[str, list[str]] = {}
    for path in weights:
        by_folder.setdefault(path.rsplit("/", 1)[0], []).append(path)
    for paths in by_folder.values():
        halves = [path for path in paths if ".fp16." in path or ".fp16-" in path]
        if halves:
            yield from set(paths) - set(halves)
        else:
            variants = [
                path for path in paths if "." in path.rsplit("/", 1)[1].removesuffix(".safetensors")
            ]
            if len(variants) < len(paths):
                yield from variants


def _folder_version(files: Iterable[SnapshotFile]) -> str:
    """A name for a bare folder's state: it changes when any object does."""
    state = [(file.path, file.size, file.etag) for file in files]
    return "bare-" + hashlib.sha256(json.dumps(state).encode()).hexdigest()[:16]
