"""Bucket to memory: manifests, ranged reads, verification, publishing.

This room knows S3 and bytes. It refuses to know torch, diffusers and what a tensor is for.
"""

from weights.bucket import Bucket
from weights.errors import (
    BucketError,
    CorruptObjectError,
    FolderError,
    ManifestError,
    ModelNotFoundError,
    ObjectChangedError,
    WeightsError,
)
from weights.manifest import FileEntry, Manifest
from weights.publish import Publication, activate, plan_publication, publish
from weights.snapshot import Snapshot, find_snapshot, read_latest, read_manifest
from weights.stream import LandedTensor, ModelStream, open_model

__all__ = [
    "Bucket",
    "BucketError",
    "CorruptObjectError",
    "FileEntry",
    "FolderError",
    "LandedTensor",
    "Manifest",
    "ManifestError",
    "ModelNotFoundError",
    "ModelStream",
    "ObjectChangedError",
    "Publication",
    "Snapshot",
    "WeightsError",
    "activate",
    "find_snapshot",
    "open_model",
    "plan_publication",
    "publish",
    "read_latest",
    "read_manifest",
]
