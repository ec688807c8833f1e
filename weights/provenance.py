"""How a version came about: with which options and tools. Beside the manifest, for people; no reader needs it.

It is no part of the manifest, whose every field names the version: the same bytes made with a newer torch are the same
version, and servers of before refuse a manifest with a field they do not know. The first publication's stays.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any, Final

from weights.activation import NO_CONDITIONS, SOMEBODY_WAS_FASTER
from weights.bucket import Bucket
from weights.errors import BucketError, ManifestError

FORMAT: Final = "lightning-in-a-bucket/provenance/1"
# Hidden files are never published, so no file of a model can be called this.
PROVENANCE_NAME = ".provenance.json"
PROVENANCE_LIMIT = 256 * 1024  # bytes

logger = logging.getLogger(__name__)


def write_provenance(
    bucket: Bucket, model_path: str, version: str, facts: Mapping[str, Any]
) -> None:
    """Write down how the version came about, unless that is there already. Raises BucketError, ManifestError."""
    key = f"{model_path}/{version}/{PROVENANCE_NAME}"
    try:
        data = json.dumps({"format": FORMAT, **facts}, indent=1, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ManifestError(
            f"the provenance to publish cannot be written as JSON: {error}. Give it plain values"
        ) from None
    if bucket.size(key) is not None:
        return
    body = data.encode() + b"\n"
    try:
        bucket.put(key, body, content_type="application/json", only_over="")
    except BucketError as error:
        if error.code in SOMEBODY_WAS_FASTER:
            return  # another owner's, of the same bytes
        if error.code not in NO_CONDITIONS:
            raise
        bucket.put(key, body, content_type="application/json")


def read_provenance(bucket: Bucket, model_path: str, version: str) -> dict[str, Any] | None:
    """What was written down, less the format; None where nothing was, or nothing that can be read."""
    key = f"{model_path}/{version}/{PROVENANCE_NAME}"
    try:
        facts = json.loads(bucket.get(key, limit=PROVENANCE_LIMIT))
    except BucketError as error:
        if not error.is_missing_or_hidden:
            logger.warning("%s", error)
        return None
    except (ValueError, RecursionError) as error:
        logger.warning("%s is not valid JSON (%s)", bucket.url(key), error)
        return None
    if not isinstance(facts, dict) or facts.get("format") != FORMAT:
        return None
    return {name: value for name, value in facts.items() if name != "format"}
