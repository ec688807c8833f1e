"""What kind of place a SOURCE names: a Hub repo, a folder, one file of either, a folder in a bucket. Looks at names."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from checks import check_bucket_name, check_model_path
from preparation.errors import UsageError
from preparation.hub import is_repo_id
from weights.manifest import is_pickle

SUFFIX = ".safetensors"


class SourceKind(Enum):
    """What a model can be read from."""

    HUB = "a Hub repo"
    HUB_FILE = "a file of a Hub repo"
    FOLDER = "a local folder"
    FILE = "a local file"
    S3 = "an S3 bucket"
    GCS = "a Google Cloud Storage bucket"


_BY_SCHEME = {"s3": SourceKind.S3, "gs": SourceKind.GCS}


@dataclass(frozen=True)
class SourceName:
    """A SOURCE taken apart: `text` as it was given; bucket and prefix (no slash at its ends) of one in a bucket; repo,
    and file in it, of one on the Hub."""

    kind: SourceKind
    text: str
    bucket: str = ""
    prefix: str = ""
    repo: str = ""
    file: str = ""

    @property
    def suggested_name(self) -> str:
        """What --name might be, for a source that does not say it."""
        if self.bucket:
            return f"me/{(self.prefix or self.bucket).rpartition('/')[2]}"
        if self.kind is SourceKind.FILE:
            return f"me/{Path(self.text).stem}"
        return f"me/{Path(self.text).expanduser().resolve().name or 'model'}"


def parse_source(text: str, *, named: bool) -> SourceName:
    """Tell what `text` is.

    `OWNER/NAME:path` is a file of a Hub repo, and what ends in .safetensors one of this disk. Anything else that
    cannot be a repo's name is a folder. What could be both is a folder only if one is there and --name says what to
    call it, as a folder needs (`named`).

    Raises:
        UsageError: it has a scheme that is not known here, its bucket or prefix cannot be one, or it is a file that
            cannot be a single-file checkpoint.
    """
    scheme, separator, rest = text.partition("://")
    if separator:
        return _parse_place(text, scheme.lower(), rest)
    here = Path(text).expanduser()
    repo, colon, file = text.partition(":")
    if colon and is_repo_id(repo) and not here.exists():
        _check_suffix(text, file)
        return SourceName(SourceKind.HUB_FILE, text, repo=repo, file=file)
    is_weights = text.endswith(SUFFIX) or (is_pickle(text) and not is_repo_id(text))
    if here.is_file() or (is_weights and not here.is_dir()):
        _check_suffix(text, text)
        return SourceName(SourceKind.FILE, text)
    if is_repo_id(text) and not (named and here.is_dir()):
        return SourceName(SourceKind.HUB, text)
    return SourceName(SourceKind.FOLDER, text)


def _check_suffix(text: str, file: str) -> None:
    if is_pickle(file):
        raise UsageError(
            f"{text} is a pickle, which can run any code when opened and is never used here. Look for the same "
            f"checkpoint as {SUFFIX}, or convert it in a sandbox."
        )
    if not file.endswith(SUFFIX):
        raise UsageError(
            f"{text} cannot be a source: of single files only checkpoints in safetensors can ({SUFFIX})."
        )


def _parse_place(text: str, scheme: str, rest: str) -> SourceName:
    if scheme not in _BY_SCHEME:
        known = " or ".join(f"{one}://BUCKET/FOLDER" for one in _BY_SCHEME)
        raise UsageError(
            f"{text} cannot be a source. Give a Hub repo (OWNER/NAME) or a checkpoint in one "
            f"(OWNER/NAME:FILE{SUFFIX}), a local folder or checkpoint, or {known}."
        )
    bucket, _, prefix = rest.partition("/")
    prefix = prefix.strip("/")
    if prefix.endswith(SUFFIX):
        raise UsageError(
            f"{text} cannot be a source: of a bucket a whole folder is read. Download the file, and give that."
        )
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
