"""Bucket to memory: manifests, ranged reads, verification, publishing.

This room knows S3 and bytes. It refuses to know torch, diffusers and what a tensor is for.

Names are imported when they are first asked for: the reading process, which starts with every cold start, needs few.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from weights.activation import activate
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
    from weights.landing import LandedTensor
    from weights.manifest import FileEntry, Manifest
    from weights.options import ReadOptions
    from weights.publishing import Publication, plan_publication, publish
    from weights.snapshot import Snapshot, find_snapshot, read_latest, read_manifest
    from weights.stream import ModelStream, open_model

_HOMES = {
    "activation": ["activate"],
    "bucket": ["Bucket"],
    "errors": [
        "BucketError",
        "CorruptObjectError",
        "FolderError",
        "ManifestError",
        "ModelNotFoundError",
        "ObjectChangedError",
        "WeightsError",
    ],
    "landing": ["LandedTensor"],
    "manifest": ["FileEntry", "Manifest"],
    "options": ["ReadOptions"],
    "publishing": ["Publication", "plan_publication", "publish"],
    "snapshot": ["Snapshot", "find_snapshot", "read_latest", "read_manifest"],
    "stream": ["ModelStream", "open_model"],
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

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
    "ReadOptions",
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


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"weights.{_HOME_OF[name]}"), name)
