"""The one place that turns settings into an S3 client, and S3's errors into words a person can act on.

It knows boto3 and nothing of models or images; the rooms hold the client it makes. boto3 takes a second to import, so
it is imported where it is used: the words for S3's errors serve code that never needs it.
"""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

    from settings import StorageSettings

ATTEMPTS = 5
CONNECT_TIMEOUT = 10.0  # seconds
READ_TIMEOUT = 60.0  # seconds without a byte
_KNOWN_DIGEST = "s3v4-known-digest"  # the name of a way of signing, as botocore lists them


@dataclass(frozen=True)
class Explanation:
    """Why a call to S3 failed, and what a person can do about it. Holds no secret."""

    cause: str
    advice: str

    def __str__(self) -> str:
        return f"{self.cause}. {self.advice}"


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


CERTIFICATE_REFUSED = Explanation(
    "the server's TLS certificate was not accepted",
    "Check AWS_ENDPOINT_URL_S3 (https:// or http://?) and the machine's clock and certificates",
)
UNREACHED = Explanation(
    "the server could not be reached", "Check AWS_ENDPOINT_URL_S3 and the machine's network"
)
_KEYS_ADVICE = "Check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
_BY_CODE = {
    "NoSuchBucket": (
        "the bucket does not exist",
        "Check the bucket's name, AWS_ENDPOINT_URL_S3 and AWS_REGION",
    ),
    "NoSuchKey": ("there is no such object", "Check the path, and that it was published"),
    "AccessDenied": (
        "the keypair may not do that, or there is no such object (S3 says the same of both to a key that cannot list)",
        "Check the path and the policy attached to the access key (iam/ has the policies that suffice)",
    ),
    "InvalidAccessKeyId": ("the access key ID is not known to the server", _KEYS_ADVICE),
    "SignatureDoesNotMatch": (
        "the secret access key does not belong to the access key ID",
        _KEYS_ADVICE,
    ),
    "ExpiredToken": (
        "the temporary credentials have expired",
        "Get new ones, or use a keypair that does not expire",
    ),
    "InvalidToken": ("the session token is not valid", "Check AWS_SESSION_TOKEN, or unset it"),
    "RequestTimeTooSkewed": (
        "this machine's clock is too far from the server's",
        "Set the clock (NTP) and try again",
    ),
    "PreconditionFailed": ("the object was changed meanwhile", "Try again"),
    "InvalidRange": (
        "the object is shorter than expected",
        "It was truncated or replaced: publish the model again",
    ),
    "PermanentRedirect": ("the bucket is in another region", "Set AWS_REGION to its region"),
    "AuthorizationHeaderMalformed": (
        "the bucket is in another region",
        "Set AWS_REGION to its region",
    ),
    "SlowDown": (
        "the server asks for fewer requests at once",
        "Try again later, or with fewer connections",
    ),
}
_SAME_AS = {
    "404": "NoSuchKey",
    "NotFound": "NoSuchKey",
    "403": "AccessDenied",
    "Forbidden": "AccessDenied",
    "412": "PreconditionFailed",
    "416": "InvalidRange",
    "301": "PermanentRedirect",
    "TokenRefreshRequired": "ExpiredToken",
    "503": "SlowDown",
    "ServiceUnavailable": "SlowDown",
}


def usual_code(code: str) -> str:
    """One name for what servers, and answers without a body, call differently: "404" is NoSuchKey."""
    return _SAME_AS.get(code, code)


def error_code(error: Exception) -> str:
    """S3's code for what went wrong ("NoSuchKey", "AccessDenied", …); "" where the server gave no answer."""
    from botocore import exceptions as botocore_errors

    if not isinstance(error, botocore_errors.ClientError):
        return ""
    return usual_code(str(error.response.get("Error", {}).get("Code", "")))


def explain(error: Exception) -> Explanation:
    """Put an error of boto3, botocore or the connection below into words: what happened, what to try."""
    from botocore import exceptions as botocore_errors

    if isinstance(error, botocore_errors.ClientError):
        details = error.response.get("Error", {})
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", "no status")
        return explain_answer(error_code(error), status, details.get("Message", ""))
    if isinstance(
        error, (botocore_errors.NoCredentialsError, botocore_errors.PartialCredentialsError)
    ):
        return Explanation(
            "no credentials were found",
            "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or give the machine a role",
        )
    if isinstance(error, botocore_errors.SSLError):
        return CERTIFICATE_REFUSED
    if isinstance(
        error, (botocore_errors.EndpointConnectionError, botocore_errors.ConnectTimeoutError)
    ):
        return UNREACHED
    # Its type and no more: the text of an error from below may quote a header, and with it a credential.
    return Explanation(
        f"the connection failed ({type(error).__name__})",
        "Try again; if it stays, check AWS_ENDPOINT_URL_S3 and the network",
    )


def explain_answer(code: str, status: int | str, message: str) -> Explanation:
    """Put an error that the server answered into words; `code` as `usual_code` gives it."""
    if code in _BY_CODE:
        cause, advice = _BY_CODE[code]
        return Explanation(cause, advice)
    return Explanation(
        f"the server answered {code or 'an error'} ({status}): {message or 'no message'}",
        "Try again; if it stays, look the code up with your storage provider",
    )
