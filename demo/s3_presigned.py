"""Checks presigned S3 URLs (AWS Signature Version 4 in the query) and signs their requests anew with headers.

moto answers 500 to presigned URLs when it enforces IAM. So the signature and the expiry are checked here, and the same
request goes on signed by header: whether its key may do what it asks stays moto's decision. See "Authenticating
Requests: Using Query Parameters" in the Amazon S3 API Reference.
"""

import hmac
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from urllib.parse import parse_qsl, quote, unquote

from botocore.auth import S3SigV4Auth, S3SigV4QueryAuth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials

_LONGEST = timedelta(days=7)
_REQUIRED = ("Algorithm", "Credential", "Date", "Expires", "SignedHeaders", "Signature")


@dataclass
class Refusal(Exception):  # noqa: N818 (it is an answer of the protocol, not a failure of this program)
    """Why S3 would not accept the request: what its error document says."""

    status: int
    code: str
    message: str


@dataclass(frozen=True)
class SignedRequest:
    """The request without its signing parameters, and the headers that sign it instead."""

    query: str
    headers: Mapping[str, str]


def is_presigned(query: str) -> bool:
    return (
        "X-Amz-Signature=" in query or "X-Amz-Algorithm=" in query or "&Signature=" in f"&{query}"
    )


def sign_by_header(
    method: str,
    url: str,
    headers: Mapping[str, str],
    secret_of: Callable[[str], str | None],
    now: datetime,
) -> SignedRequest:
    """Check a presigned request and return its equal with an Authorization header.

    Args:
        url: as the client sent it: scheme, host, encoded path and query.
        headers: the request's headers, names in lower case.
        secret_of: the secret of an access key id, or None.
        now: the server's clock, in UTC.

    Raises:
        Refusal: malformed, expired, of an unknown key, or not signed as it says.
    """
    base, _, query = url.partition("?")
    signing = {
        name.removeprefix("X-Amz-"): value
        for name, value in parse_qsl(query, keep_blank_values=True)
        if name.startswith("X-Amz-")
    }
    access_key_id, region = _check_parameters(signing)
    signed_at = _check_time(signing, now)
    secret = secret_of(access_key_id)
    if secret is None:
        raise Refusal(403, "InvalidAccessKeyId", "The access key of this URL does not exist.")

    signed_headers = signing["SignedHeaders"].split(";")
    request = AWSRequest(
        method=method,
        url=f"{base}?{_without(query, {'X-Amz-Signature'})}",
        headers={name: headers.get(name, "") for name in signed_headers},
    )
    request.context["timestamp"] = signed_at.strftime("%Y%m%dT%H%M%SZ")
    auth = S3SigV4QueryAuth(Credentials(access_key_id, secret), "s3", region)
    expected = auth.signature(
        auth.string_to_sign(request, auth.canonical_request(request)), request
    )
    if not hmac.compare_digest(expected, signing["Signature"]):
        message = "The signature of this URL is not that of its contents: was the URL altered?"
        raise Refusal(403, "SignatureDoesNotMatch", message)

    rest = _without(query, {f"X-Amz-{name}" for name in signing})
    signed = AWSRequest(
        method=method,
        url=f"{base}?{rest}" if rest else base,
        headers={"Host": headers["host"], "X-Amz-Content-SHA256": "UNSIGNED-PAYLOAD"},
    )
    signed.context["payload_signing_enabled"] = False
    S3SigV4Auth(Credentials(access_key_id, secret), "s3", region).add_auth(signed)
    return SignedRequest(query=rest, headers=dict(signed.headers.items()))


def _check_parameters(signing: Mapping[str, str]) -> tuple[str, str]:
    missing = [f"X-Amz-{name}" for name in _REQUIRED if not signing.get(name)]
    scope = signing.get("Credential", "").split("/")
    well_formed = len(scope) == 5 and scope[3:] == ["s3", "aws4_request"]
    if signing.get("Algorithm") != "AWS4-HMAC-SHA256" or missing or not well_formed:
        message = "A presigned URL needs Signature Version 4 (AWS4-HMAC-SHA256) and all its X-Amz- parameters."
        raise Refusal(400, "AuthorizationQueryParametersError", message)
    return scope[0], scope[2]


def _check_time(signing: Mapping[str, str], now: datetime) -> datetime:
    try:
        signed_at = datetime.strptime(signing["Date"], "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)
        lifetime = timedelta(seconds=int(signing["Expires"]))
    except (ValueError, OverflowError) as error:
        message = "X-Amz-Date or X-Amz-Expires is malformed."
        raise Refusal(400, "AuthorizationQueryParametersError", message) from error
    if not timedelta(0) < lifetime <= _LONGEST:
        message = "X-Amz-Expires must be from 1 second to 7 days."
        raise Refusal(400, "AuthorizationQueryParametersError", message)
    if now > signed_at + lifetime:
        raise Refusal(403, "AccessDenied", "Request has expired")
    if signed_at > now + timedelta(minutes=15):
        raise Refusal(403, "AccessDenied", "Request is not valid yet")
    return signed_at


def _without(query: str, names: set[str]) -> str:
    """The query as it was, byte for byte, without these parameters."""
    parts = [part for part in query.split("&") if part]
    return "&".join(part for part in parts if unquote(part.partition("=")[0]) not in names)


def error_document(refusal: Refusal, path: str) -> bytes:
    """S3's error document."""
    return (
        '<?xml version="1.0" encoding="UTF-8"?>\n'
        f"<Error><Code>{refusal.code}</Code><Message>{refusal.message}</Message>"
        f"<Resource>{quote(path)}</Resource><RequestId>embedded</RequestId></Error>"
    ).encode()
