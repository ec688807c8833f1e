"""What kind of place a SOURCE names: a Hub repo, a folder on this disk, a folder in a bucket. Looks at names only."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from preparation.errors import UsageError
from preparation.hub import is_repo_id
from settings import check_bucket_name, check_model_path


class SourceKind(Enum):
    """What a model can be read from."""

    HUB = "a Hub repo"
    FOLDER = "a local folder"
    S3 = "an S3 bucket"
    GCS = "a Google Cloud Storage bucket"


_BY_SCHEME = {"s3": SourceKind.S3, "gs": SourceKind.GCS}


@dataclass(frozen=True)
class SourceName:
    """A SOURCE taken apart: `text` as it was given; bucket and prefix (no slash at its ends) of one in a bucket."""

    kind: SourceKind
    text: str
    bucket: str = ""
    prefix: str = ""

    @property
    def suggested_name(self) -> str:
        """What --name might be, for a source that does not say it."""
        if self.bucket:
            return f"me/{(self.prefix or self.bucket).rpartition('/')[2]}"
        return f"me/{Path(self.text).expanduser().resolve().name or 'model'}"


def parse_source(text: str, *, named: bool) -> SourceName:
    """Tell what `text` is.

    Anything that cannot be a repo's name is a folder. What could be both is a folder only if one is there and
    --name says what to call it, as a folder needs (`named`).

    Raises:
        UsageError: it has a scheme that is not known here, or its bucket or prefix cannot be one.
    """
    scheme, separator, rest = text.partition("://")
    if separator:
        return _parse_place(text, scheme.lower(), rest)
    if is_repo_id(text) and not (named and Path(text).is_dir()):
        return SourceName(SourceKind.HUB, text)
    return SourceName(SourceKind.FOLDER, text)


def _parse_place(text: str, scheme: str, rest: str) -> SourceName:
    if scheme not in _BY_SCHEME:
        known = " or ".join(f"{one}://BUCKET/FOLDER" for one in _BY_SCHEME)
        raise UsageError(
            f"{text} cannot be a source. Give a Hub repo (OWNER/NAME), a local folder, or {known}."
        )
    bucket, _, prefix = rest.partition("/")
    prefix = prefix.strip("/")
    wrong = f"bucket {bucket!r}"
    try:
        check_bucket_name(bucket)
        wrong = f"folder {prefix!r}"
        if prefix:
            check_model_path(prefix)
    except ValueError as error:
        raise UsageError(
            f"{text!r} cannot be a source: its {wrong} {error}. Write {scheme}://BUCKET/FOLDER."
        ) from None
    return SourceName(_BY_SCHEME[scheme], text, bucket, prefix)
