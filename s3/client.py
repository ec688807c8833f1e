"""The one place that turns settings into a client of boto3; the rooms hold what it makes."""

from __future__ import annotations

import base64
import hashlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

    from settings import StorageSettings

ATTEMPTS = 5
CONNECT_TIMEOUT = 10.0  # seconds
READ_TIMEOUT = 60.0  # seconds without a byte
_KNOWN_DIGEST = "s3v4-known-digest"  # the name of a way of signing, as botocore lists them


def connect(
    settings: StorageSettings,
    *,
    connections: int = 32,
    sign: bool = True,
    attempts: int | None = None,
    read_timeout: float = READ_TIMEOUT,
) -> S3Client:
    """Make a client that retries by itself, for at most `connections` calls at once.

    Path-style addressing with a custom endpoint: gateways and caches such as TAG need it, and a host name per
    bucket rarely resolves there. Checksum trailers only where S3 requires them: Tigris and older servers reject
    them, and the rooms verify what they read and write themselves. A body that has a `sha256` (hexadecimal) is signed
    with that instead of being read once more. `sign=False` is for servers that know a caller by other means, or let
    everyone in. Raises SettingsError for an AWS profile that is not there.
    """
    import boto3
    from botocore import UNSIGNED
    from botocore import exceptions as botocore_errors
    from botocore.config import Config

    from settings import SettingsError

    style = settings.addressing_style
    if style == "auto":
        style = "path" if settings.endpoint_url else "virtual"
    try:
        session = boto3.session.Session(
            aws_access_key_id=settings.access_key_id,
            aws_secret_access_key=_secret(settings.secret_access_key),
            aws_session_token=_secret(settings.session_token),
            region_name=settings.region or ("auto" if settings.endpoint_url else None),
        )
    except botocore_errors.ProfileNotFound as error:
        raise SettingsError(
            f"AWS_PROFILE is wrong: {error}. Unset it, or name a profile that is there"
        ) from None
    client = session.client(
        "s3",
        region_name=session.region_name or "us-east-1",
        endpoint_url=settings.endpoint_url,
        config=Config(
            signature_version="s3v4" if sign else UNSIGNED,
            s3={"addressing_style": style},
            retries={"mode": "standard", "total_max_attempts": attempts or ATTEMPTS},
            connect_timeout=CONNECT_TIMEOUT,
            read_timeout=read_timeout,
            max_pool_connections=connections,
            tcp_keepalive=True,
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
        ),
    )
    _sign_with_known_digests(client)
    return client


def _sign_with_known_digests(client: S3Client) -> None:
    from botocore.auth import AUTH_TYPE_MAPS, S3SigV4Auth

    class KnownDigestAuth(S3SigV4Auth):
        def payload(self, request: Any) -> Any:
            return getattr(request.body, "sha256", None) or super().payload(request)

    def choose(signature_version: Any, **_: Any) -> Any:
        return _KNOWN_DIGEST if signature_version in ("v4", "s3v4") else None

    AUTH_TYPE_MAPS[_KNOWN_DIGEST] = KnownDigestAuth
    client.meta.events.register("choose-signer.s3", choose)


def _secret(value: Any) -> str | None:
    return None if value is None else str(value.get_secret_value())


def content_md5(data: bytes) -> str:
    """The Content-MD5 header's value: by it S3 refuses bytes that did not arrive as sent. No security digest."""
    return base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()
