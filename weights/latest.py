"""Which version is published now, asked again and again for next to nothing: the server says "not changed"."""

from __future__ import annotations

from weights.bucket import Bucket
from weights.errors import BucketError
from weights.manifest import LATEST_NAME, parse_latest
from weights.snapshot import LATEST_LIMIT


def ask_once(bucket: Bucket, model_path: str) -> str:
    """The published version, asked for without a second attempt: for whom it is good to know and no more.

    Raises BucketError, also where there is no latest.json or it may not be read, and ManifestError for a broken one.
    """
    key = f"{model_path}/{LATEST_NAME}"
    found = bucket.reader.get_if_changed(key, None, limit=LATEST_LIMIT, attempts=1)
    if found is None:
        raise BucketError(f"cannot read {bucket.url(key)}: the server says it has not changed")
    return parse_latest(found.data, bucket.url(key))


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
