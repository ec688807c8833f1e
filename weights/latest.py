"""Which version is published now, asked again and again for next to nothing: the server says "not changed"."""

from __future__ import annotations

from weights.bucket import Bucket
from weights.errors import BucketError
from weights.manifest import LATEST_NAME, parse_latest
from weights.snapshot import LATEST_LIMIT


class LatestWatch:
    """Asks for one model's latest.json, conditionally. For one thread."""

    def __init__(self, bucket: Bucket, model_path: str) -> None:
        self._bucket = bucket
        self._key = f"{model_path}/{LATEST_NAME}"
        self._etag: str | None = None
        self._version: str | None = None

    def version(self) -> str | None:
        """The published version; None for a bare folder. Raises BucketError, and ManifestError for a broken one."""
        try:
            found = self._bucket.reader.get_if_changed(self._key, self._etag, limit=LATEST_LIMIT)
        except BucketError as error:
            if error.is_missing_or_hidden:
                return None
            raise
        if found is not None:
            self._version = parse_latest(found.data, self._bucket.url(self._key))
            self._etag = found.etag
        return self._version
