"""Signatures for S3 requests: AWS Signature Version 4, and whose keys they are made with.

It sends nothing. boto3's own signer would do, were it not for the half second that importing it takes before the
first byte; the machine's own credentials are left to botocore.

Source: https://docs.aws.amazon.com/AmazonS3/latest/API/sig-v4-header-based-auth.html
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Protocol

from s3.endpoint import boto3_target
from s3.words import Explanation, error_code, explain

if TYPE_CHECKING:
    from botocore.credentials import Credentials as BotocoreCredentials
    from botocore.session import Session as BotocoreSession

    from settings import StorageSettings

CLOCK_STEP_S = 0.25  # a correction by less would change nothing
EMPTY_SHA256 = hashlib.sha256(b"").hexdigest()
# What a proxy or a server's front may change on the way. Accept-Encoding is one: Google's front rewrites it, see
# https://github.com/aws/aws-sdk-go-v2/issues/1816
_NOT_SIGNED = frozenset(
    {
        "accept-encoding",
        "baggage",
        "connection",
        "expect",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authorization",
        "te",
        "traceparent",
        "tracestate",
        "trailer",
        "transfer-encoding",
        "upgrade",
        "user-agent",
        "x-amzn-trace-id",
    }
)

_log = logging.getLogger(__name__)


class CredentialsError(Exception):
    """There are no credentials, or they cannot be loaded. Holds no secret."""

    def __init__(self, explanation: Explanation) -> None:
        super().__init__(f"cannot sign requests to the bucket: {explanation}")
        self.explanation = explanation


@dataclass(frozen=True)
class Credentials:
    """Who asks. `session_token` comes with temporary credentials."""

    access_key_id: str
    secret_access_key: str = field(repr=False)
    session_token: str | None = field(default=None, repr=False)


class CredentialsSource(Protocol):
    """Where credentials come from. May be called from many threads; raises CredentialsError."""

    @property
    def is_at_hand(self) -> bool:
        """Whether a call returns at once. Otherwise the machine is asked for them, which may take seconds."""
        ...

    def __call__(self) -> Credentials: ...


def credentials_of(settings: StorageSettings) -> CredentialsSource:
    """Where to get the credentials for each signature: the settings' keypair, or else what botocore finds.

    The machine's own raise CredentialsError where there are none or they cannot be loaded, SettingsError for an AWS
    profile that is not there.
    """
    if settings.access_key_id is None or settings.secret_access_key is None:
        return _AmbientCredentials()
    token = settings.session_token
    return Keypair(
        Credentials(
            settings.access_key_id,
            settings.secret_access_key.get_secret_value(),
            None if token is None else token.get_secret_value(),
        )
    )


def region_of(settings: StorageSettings) -> str:
    """The region to sign for, by the rule of `s3.connect`. boto3 is asked only on AWS, where none is set."""
    region = settings.region
    if settings.endpoint_url is not None:
        return region or "auto"
    # aws-global and fips-us-east-1 are no regions but names of endpoints.
    if region is None or region.endswith("-global") or "fips" in region:
        return boto3_target(settings)[1]
    return region


class Signer:
    """Signs requests. Safe to use from many threads."""

    def __init__(
        self, credentials: Callable[[], Credentials], region: str, clock_offset: float = 0.0
    ) -> None:
        self.region = region
        self._credentials = credentials
        self._clock_offset = clock_offset
        self._key = _SigningKey("", "", b"")

    @property
    def clock_offset(self) -> float:
        """Seconds by which the server's clock is taken to be ahead of this machine's."""
        return self._clock_offset

    def adjust_clock(self, server_date_header: str) -> None:
        """Sign by the server's clock from now on, given the Date header of an answer that has just come.

        For after a RequestTimeTooSkewed: S3 refuses what was signed more than 15 minutes from its own time. A header
        that is no date changes nothing.
        """
        from email.utils import parsedate_to_datetime

        try:
            server = parsedate_to_datetime(server_date_header)
        except (ValueError, OverflowError):
            return
        if server.tzinfo is None:  # "-0000", by RFC 5322: UTC
            server = server.replace(tzinfo=UTC)
        self._clock_offset = (server - datetime.now(UTC)).total_seconds()

    def has_corrected(self, server_date_header: str | None, offset: float) -> bool:
        """After a RequestTimeTooSkewed of what was signed with `offset`: whether to sign, and ask, once more.

        Signs with the server's time from now on; False where that was done before, and did not help.
        """
        if abs(self._clock_offset - offset) > CLOCK_STEP_S:
            return True  # another request has met the same, and seen to it
        self.adjust_clock(server_date_header or "")
        if abs(self._clock_offset - offset) <= CLOCK_STEP_S:
            return False
        _log.warning(
            "this machine's clock is %.0f s off the server's: signing with the server's time. Set the clock (NTP)",
            self._clock_offset,
        )
        return True

    # 25 µs, 27 µs with a session token; botocore's S3SigV4Auth takes 150 µs for the same, on the same core.
    def headers(
        self,
        method: str,
        host_header: str,
        path: str,
        query: str,
        headers: Mapping[str, str],
        now: datetime | None = None,
        payload_sha256: str = EMPTY_SHA256,
    ) -> dict[str, str]:
        """All headers to send: `headers` (signed too), Host, and those that carry the signature.

        `path` and `query` are percent-encoded, just as they are sent. `now` is an aware time instead of the clock's.
        `payload_sha256` is the body's, hexadecimal; by it S3 refuses one that did not arrive as sent. Raises what the
        credentials raise.
        """
        moment = now or datetime.now(UTC) + timedelta(seconds=self._clock_offset)
        timestamp = moment.astimezone(UTC).strftime("%Y%m%dT%H%M%SZ")
        day = timestamp[:8]
        credentials = self._credentials()
        sent = {
            "Host": host_header,
            **headers,
            "x-amz-content-sha256": payload_sha256,
            "x-amz-date": timestamp,
        }
        if credentials.session_token:
            sent["x-amz-security-token"] = credentials.session_token
        canonical_headers, signed_headers = _canonical_headers(sent)
        request = (
            f"{method}\n{path}\n{_canonical_query(query)}\n"
            f"{canonical_headers}\n{signed_headers}\n{payload_sha256}"
        )
        scope = f"{day}/{self.region}/s3/aws4_request"
        digest = hashlib.sha256(request.encode()).hexdigest()
        to_sign = f"AWS4-HMAC-SHA256\n{timestamp}\n{scope}\n{digest}"
        signature = _hmac(self._signing_key(credentials.secret_access_key, day), to_sign).hex()
        sent["Authorization"] = (
            f"AWS4-HMAC-SHA256 Credential={credentials.access_key_id}/{scope}, "
            f"SignedHeaders={signed_headers}, Signature={signature}"
        )
        return sent

    def _signing_key(self, secret: str, day: str) -> bytes:
        known = self._key  # replaced as a whole, so that no lock is needed
        if known.secret != secret or known.day != day:
            known = _SigningKey(secret, day, _derive_key(secret, day, self.region))
            self._key = known
        return known.key


@dataclass(frozen=True)
class _SigningKey:
    secret: str = field(repr=False)
    day: str
    key: bytes = field(repr=False)


class Keypair:
    """A CredentialsSource of credentials that are known."""

    is_at_hand = True

    def __init__(self, credentials: Credentials) -> None:
        self._credentials = credentials

    def __call__(self) -> Credentials:
        return self._credentials


class _AmbientCredentials:
    """botocore's chain: environment, profiles, container and instance roles; renewed before they expire."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._asked = False
        self._source: BotocoreCredentials | None = None

    @property
    def is_at_hand(self) -> bool:
        refresh_needed = getattr(self._source, "refresh_needed", None)
        return self._source is not None and not (refresh_needed and refresh_needed())

    def __call__(self) -> Credentials:
        from botocore import exceptions as botocore_errors

        try:
            with self._lock:
                # Once: where the machine has no role, every look for one waits for seconds.
                if not self._asked:
                    self._source = _botocore_session().get_credentials()
                    self._asked = True
            frozen = self._source.get_frozen_credentials() if self._source else None
            if frozen is None or not frozen.access_key or not frozen.secret_key:
                raise botocore_errors.NoCredentialsError
        except (
            botocore_errors.NoCredentialsError,
            botocore_errors.PartialCredentialsError,
        ) as error:
            raise CredentialsError(explain(error)) from error
        except (botocore_errors.BotoCoreError, botocore_errors.ClientError) as error:
            raise CredentialsError(
                Explanation(
                    "the machine's own credentials could not be loaded "
                    f"({error_code(error) or type(error).__name__})",
                    "Check its role or its AWS profile, or set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
                )
            ) from error
        return Credentials(frozen.access_key, frozen.secret_key, frozen.token or None)


def check_profile() -> None:
    """Raises SettingsError for an AWS profile that is not there."""
    _botocore_session()


def _botocore_session() -> BotocoreSession:
    from botocore import exceptions as botocore_errors
    from botocore.session import Session

    from settings import SettingsError

    session = Session()
    try:
        session.get_scoped_config()
    except botocore_errors.ProfileNotFound as error:
        raise SettingsError(
            f"AWS_PROFILE is wrong: {error}. Unset it, or name a profile that is there"
        ) from None
    return session


def _canonical_headers(sent: Mapping[str, str]) -> tuple[str, str]:
    """The canonical headers, a line each, and their names."""
    lowered = ((name.lower(), " ".join(value.split())) for name, value in sent.items())
    signed = sorted(pair for pair in lowered if pair[0] not in _NOT_SIGNED)
    return "".join(f"{name}:{value}\n" for name, value in signed), ";".join(
        name for name, _ in signed
    )


def _canonical_query(query: str) -> str:
    if not query:
        return ""
    pairs = sorted(pair.partition("=")[::2] for pair in query.split("&"))
    return "&".join(f"{name}={value}" for name, value in pairs)


def _derive_key(secret: str, day: str, region: str) -> bytes:
    key = f"AWS4{secret}".encode()
    for part in (day, region, "s3", "aws4_request"):
        key = _hmac(key, part)
    return key


def _hmac(key: bytes, message: str) -> bytes:
    return hmac.digest(key, message.encode(), "sha256")
