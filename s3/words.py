"""S3's errors in words a person can act on, whoever met them: boto3, or the readers and clients of this product."""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import dataclass
from email.utils import parsedate_to_datetime

_ELEMENT = {name: re.compile(f"<{name}>([^<]*)</{name}>") for name in ("Code", "Message", "Region")}


@dataclass(frozen=True)
class Explanation:
    """Why a call to S3 failed, and what a person can do about it. Holds no secret."""

    cause: str
    advice: str

    def __str__(self) -> str:
        return f"{self.cause}. {self.advice}"


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


def error_in(document: str) -> tuple[str, str]:
    """S3's code and message in the XML of a refusal; "" for what is not there."""
    return _element("Code", document), _element("Message", document)


def region_in(document: str) -> str:
    """The region where the bucket is, as a refusal in the wrong one says; "" where it does not."""
    return _element("Region", document)


def _element(name: str, document: str) -> str:
    found = _ELEMENT[name].search(document)
    return found[1] if found else ""


def seconds_to_wait(retry_after: str | None, date: str | None) -> float | None:
    """What a Retry-After header asks for, a number or a date; None where there is none that can be read.

    `date` is the same answer's Date header.
    """
    if retry_after is None:
        return None
    with suppress(ValueError):
        return max(0.0, float(retry_after))
    try:
        until = parsedate_to_datetime(retry_after)
        sent = parsedate_to_datetime(date or "")
        return max(0.0, (until - sent).total_seconds())
    except (TypeError, ValueError):
        return None


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
    return connection_failed(error)


def connection_failed(error: Exception) -> Explanation:
    """Its type and no more: the text of an error from below may quote a header, and with it a credential."""
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
