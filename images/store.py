"""Encoded images to the image bucket, and a URL for each that arrived.

One PUT per image, never over an existing one, with a digest that makes the server refuse damaged bytes. Retries of
busy servers and broken connections are the client's own (s3.connect). It does not know what is in the images.
"""

from __future__ import annotations

import logging
import re
import secrets
import uuid
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING
from urllib.parse import quote, unquote, urlsplit

from botocore import exceptions as botocore_errors
from botocore.exceptions import BotoCoreError, ClientError

import s3
from images.encode import EncodedImage
from images.errors import ImagesError
from s3 import client as s3_client

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client
    from mypy_boto3_s3.type_defs import PutObjectRequestTypeDef
    from pydantic import JsonValue

LONGEST_ID = 64
LARGEST_IMAGE = 64 * 1024 * 1024  # bytes
# How often a PUT is tried another way: a second name, without the condition, once more after damage on the wire.
ATTEMPTS = 4
# A key is written once and never again, so whoever holds a copy need not ask for a newer one.
CACHE_FOREVER = "max-age=31536000, immutable"

# 412: the key is taken. 409: somebody is writing it at this moment (AWS answers so to conditional writes).
_TAKEN = ("PreconditionFailed", "ConditionalRequestConflict")
_NO_CONDITIONS = ("NotImplemented", "501")
_DAMAGED = "BadDigest"

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StoredImage:
    """An image that the bucket has acknowledged, and the URL to fetch it from."""

    bucket: str
    key: str
    url: str


@dataclass(frozen=True)
class ReadImage:
    """The bytes of an image, and what they are."""

    data: bytes
    content_type: str


class ImageStore:
    """The image bucket. Safe to use from several threads, as boto3's clients are."""

    def __init__(
        self,
        client: S3Client,
        bucket: str,
        prefix: str = "",
        url_lifetime: int = 3600,
        public_base_url: str | None = None,
    ) -> None:
        """`url_lifetime` is in seconds, for presigned URLs; with a `public_base_url` nothing is signed.

        A URL signed with temporary credentials (a role's) ends with them, however long its lifetime.
        """
        self.client = client
        self.bucket = bucket
        self.prefix = "/".join(part for part in prefix.split("/") if part)
        self.url_lifetime = url_lifetime
        self.public_base_url = public_base_url
        self._conditions_work = True

    def upload(
        self, encoded: EncodedImage, *, prediction_id: str | None, index: int, now: datetime
    ) -> StoredImage:
        """Store image number `index` of a prediction; returns once the server has acknowledged it. Blocks.

        The key is <prefix>/<yyyy>/<mm>/<dd>/<id>-<index>.<extension>, the date in UTC, with a short random
        suffix where that name is taken: a caller may send the same id twice. A missing id becomes a UUID.
        (When an answer is lost on its way and the client sends the image again, it finds its own first copy and
        takes the suffix too: both copies are whole, and the URL is of the second.)

        Raises ImagesError naming bucket, key, cause and what to try.
        """
        name = safe_id(prediction_id)
        folder = "/".join(filter(None, [self.prefix, f"{now.astimezone(UTC):%Y/%m/%d}"]))
        stem = f"{folder}/{name}-{index}"
        what = f"image {index} of prediction {name}"
        key = (
            f"{stem}.{encoded.extension}" if self._conditions_work else _with_suffix(stem, encoded)
        )
        for attempts_left in reversed(range(ATTEMPTS)):
            conditional = self._conditions_work
            try:
                self._put(key, encoded, conditional)
                break
            except (ClientError, BotoCoreError) as error:
                code = s3.error_code(error)
                unsupported = conditional and code in _NO_CONDITIONS
                if not attempts_left or not (unsupported or code in (*_TAKEN, _DAMAGED)):
                    raise self._not_stored(what, key, error) from error
                if unsupported:
                    self._forgo_conditions()
                if code != _DAMAGED:
                    key = _with_suffix(stem, encoded)
        return StoredImage(self.bucket, key, self._url(what, key))

    def signed_anew(self, output: JsonValue) -> JsonValue:
        """The output of an earlier prediction, with each presigned URL of an image of this store signed again.

        Everything else in it stays as it is. Raises ImagesError.
        """
        if isinstance(output, list):
            return [self.signed_anew(inner) for inner in output]
        if isinstance(output, dict):
            return {name: self.signed_anew(inner) for name, inner in output.items()}
        if not isinstance(output, str) or "X-Amz-Signature=" not in output:
            return output
        known = self._recognized(output)
        return output if known is None else known[1]

    def read(self, url: str) -> ReadImage:
        """The image that a URL of this store leads to. Blocks.

        Raises ImagesError, also for a URL of anything else and for more than LARGEST_IMAGE bytes.
        """
        key = self._key_of(url)
        if key is None:
            raise ImagesError(
                f"the prediction's output cannot be read: {url.partition('?')[0]} is no image of bucket {self.bucket}"
            )
        try:
            found = self.client.get_object(Bucket=self.bucket, Key=key)
            with closing(found["Body"]) as body:
                data = body.read(LARGEST_IMAGE + 1)
        except (ClientError, BotoCoreError) as error:
            raise ImagesError(
                f"cannot read s3://{self.bucket}/{key}: {s3.explain(error)}"
            ) from error
        if len(data) > LARGEST_IMAGE:
            raise ImagesError(
                f"s3://{self.bucket}/{key} has more than {LARGEST_IMAGE} bytes: fetch it by its URL"
            )
        return ReadImage(data, found.get("ContentType", "application/octet-stream"))

    def _key_of(self, url: str) -> str | None:
        public = f"{self.public_base_url.rstrip('/')}/" if self.public_base_url else None
        if public is None or not url.startswith(public):
            known = self._recognized(url)
            return None if known is None else known[0]
        key = unquote(url.removeprefix(public))
        return key if self._is_mine(key) else None

    def _is_mine(self, key: str) -> bool:
        return bool(key) and key.startswith(f"{self.prefix}/" if self.prefix else "")

    def _recognized(self, url: str) -> tuple[str, str] | None:
        """The key that a presigned URL of this store is of, and the URL signed again; None for any other."""
        try:
            address = urlsplit(url)
        except ValueError:
            return None
        # Path style first: the bucket may be named by the host or at the beginning of the path.
        path = unquote(address.path).lstrip("/")
        for key in (path.removeprefix(f"{self.bucket}/"), path):
            if self._is_mine(key):
                anew = self._presigned(f"an image of an earlier prediction, {key},", key)
                if anew.partition("?")[0] == url.partition("?")[0]:
                    return key, anew
        return None

    def _put(self, key: str, encoded: EncodedImage, conditional: bool) -> None:
        request: PutObjectRequestTypeDef = {
            "Bucket": self.bucket,
            "Key": key,
            "Body": encoded.data,
            "ContentMD5": s3.content_md5(encoded.data),
            "ContentType": encoded.content_type,
            "CacheControl": f"{'public' if self.public_base_url else 'private'}, {CACHE_FOREVER}",
        }
        if conditional:
            request["IfNoneMatch"] = "*"
        self.client.put_object(**request)

    def _forgo_conditions(self) -> None:
        if not self._conditions_work:  # another thread has just found out, and said so
            return
        self._conditions_work = False
        _log.warning(
            "the S3 server of bucket %s has no conditional writes (If-None-Match: *): from now on every image's "
            "name gets a random suffix, so that none is overwritten",
            self.bucket,
        )

    def _url(self, what: str, key: str) -> str:
        if self.public_base_url:
            return f"{self.public_base_url.rstrip('/')}/{quote(key)}"
        return self._presigned(what, key)

    def _presigned(self, what: str, key: str) -> str:
        try:
            return self.client.generate_presigned_url(
                "get_object",
                Params={"Bucket": self.bucket, "Key": key},
                ExpiresIn=self.url_lifetime,
            )
        except (
            BotoCoreError
        ) as error:  # signing is local, but a role's credentials may have to be renewed for it
            explanation = s3.explain(error)
            raise ImagesError(
                f"{what} is stored as s3://{self.bucket}/{key}, but its URL could not be signed: {explanation}"
            ) from error

    def _not_stored(self, what: str, key: str, error: ClientError | BotoCoreError) -> ImagesError:
        attempts = _attempts(error)
        tried = f" (tried {attempts} times)" if attempts > 1 else ""
        return ImagesError(
            f"{what} was generated but could not be stored as s3://{self.bucket}/{key}{tried}: {s3.explain(error)}"
        )


def _with_suffix(stem: str, encoded: EncodedImage) -> str:
    return f"{stem}-{secrets.token_hex(4)}.{encoded.extension}"


def _attempts(error: ClientError | BotoCoreError) -> int:
    """How often the client tried by itself before it gave up."""
    if isinstance(error, ClientError):
        return 1 + int(error.response.get("ResponseMetadata", {}).get("RetryAttempts", 0))
    # Without an answer there is no count, but botocore only ends there after its last attempt.
    unanswered = (botocore_errors.ConnectionError, botocore_errors.HTTPClientError)
    return s3_client.ATTEMPTS if isinstance(error, unanswered) else 1


def safe_id(prediction_id: str | None) -> str:
    """A caller's id as one path segment: letters, digits, and . _ - inside; at most 64 characters; never "..".

    Different ids may become the same; `upload` keeps their images apart.
    """
    cleaned = re.sub(r"[^A-Za-z0-9._-]+", "-", prediction_id or "")
    cleaned = re.sub(r"\.{2,}", ".", cleaned).strip("-.")[:LONGEST_ID].rstrip("-.")
    return cleaned or str(uuid.uuid4())
