"""What can go wrong with an answer on its way from S3, and how each of these faults changes it."""

from __future__ import annotations

import enum
import hashlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

from tests.support.object_server import Head, s3_error, status_line

BEFORE_HEAD = -1
"""As a fault's `at`: before the answer's first byte, when the upstream has already done what it was asked."""

SKEW_SECONDS = 3600.0

_INVERTED = bytes(byte ^ 0xFF for byte in range(256))
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(.*)")
_GARBAGE = b"\x16\x03\x01\x02\x00 this is not HTTP\r\n\r\n\x00\xff" * 4
_STATUS_CODES = {429: "TooManyRequests", 500: "InternalError", 503: "ServiceUnavailable"}


class FaultKind(enum.StrEnum):
    """What can go wrong between a client and its object. Those marked * never reach the upstream."""

    RESET = enum.auto()
    """A TCP RST after `at` bytes of the body."""
    TRUNCATE = enum.auto()
    """The connection is closed in good order after `at` bytes of the body; the head promised all of them."""
    STATUS = enum.auto()
    """* An S3 error document with `status` (503), and Retry-After if given."""
    STALL = enum.auto()
    """Nothing after `at` bytes of the body, for `seconds` or until the proxy is closed; then the rest."""
    DRIP = enum.auto()
    """From byte `at` of the body on, one byte every `seconds` (10 ms)."""
    FLIP = enum.auto()
    """Every bit of byte `at` of the body inverted, checksums and ETag as they were."""
    STALE = enum.auto()
    """Another version of the object: another ETag, the same one each time, and other bytes of the same length."""
    WRONG_LENGTH = enum.auto()
    """Content-Length and body `by` bytes longer than asked for, or shorter where `by` is negative."""
    WRONG_RANGE = enum.auto()
    """Content-Range shifted by `by`; the body is what was asked for."""
    NO_ETAG = enum.auto()
    """No ETag in the answer."""
    WHOLE_BODY = enum.auto()
    """Range is not passed on, so the whole object comes with 200. An upstream that checks signatures refuses this
    where Range was signed: boto3 and obstore sign it, presigned URLs do not.
    """
    RANGE_AS_200 = enum.auto()
    """Status 200 instead of 206, the rest of the answer as it was."""
    EXPIRED = enum.auto()
    """* ExpiredToken, with `status` (403; AWS itself says 400)."""
    SKEWED = enum.auto()
    """* 403 RequestTimeTooSkewed from a server whose clock, its Date field too, is `seconds` (an hour) ahead."""
    SLOW_DOWN = enum.auto()
    """* 503 SlowDown, and Retry-After if given."""
    GARBAGE = enum.auto()
    """* Something that is not HTTP at all."""
    HALF_HEADERS = enum.auto()
    """The connection is closed in the middle of the answer's head."""
    REFUSE = enum.auto()
    """* The connection is closed without an answer, once the request's head has told whom it strikes."""


@dataclass(frozen=True)
class Fault:
    """One fault; FaultKind says which fields it looks at.

    `at` counts the bytes of the answer's body, not of the object. So that a fault always strikes, beyond the end of a
    body of known length it means the last byte, and an answer without a body is struck before its head. RESET,
    TRUNCATE and STALL may be `at=BEFORE_HEAD` anyway.
    """

    kind: FaultKind
    at: int = 0
    seconds: float | None = None
    by: int = 1
    status: int | None = None
    retry_after: str | None = None


def invented_answer(fault: Fault | None, *, with_body: bool = True) -> bytes | None:
    """The whole answer to a request that the upstream never sees; None for faults of another sort."""
    if fault is None:
        return None
    retry = () if fault.retry_after is None else (("Retry-After", fault.retry_after),)
    match fault.kind:
        case FaultKind.STATUS:
            status = fault.status or 503
            code = _STATUS_CODES.get(status, "InternalError")
            message = "a fault that was asked for"
            return s3_error(status, code, message, fields=retry, with_body=with_body)
        case FaultKind.SLOW_DOWN:
            message = "Please reduce your request rate."
            status = fault.status or 503
            return s3_error(status, "SlowDown", message, fields=retry, with_body=with_body)
        case FaultKind.EXPIRED:
            message = "The provided token has expired."
            return s3_error(fault.status or 403, "ExpiredToken", message, with_body=with_body)
        case FaultKind.SKEWED:
            return _skewed(fault, with_body=with_body)
        case FaultKind.GARBAGE:
            return _GARBAGE
        case _:
            return None


def _skewed(fault: Fault, *, with_body: bool) -> bytes:
    here = datetime.now(UTC)
    there = here + timedelta(seconds=SKEW_SECONDS if fault.seconds is None else fault.seconds)
    return s3_error(
        fault.status or 403,
        "RequestTimeTooSkewed",
        "The difference between the request time and the current time is too large.",
        fields=(("Date", format_datetime(there, usegmt=True)),),
        details=(
            f"<RequestTime>{here:%Y%m%dT%H%M%SZ}</RequestTime>"
            f"<ServerTime>{there:%Y-%m-%dT%H:%M:%SZ}</ServerTime>"
            "<MaxAllowedSkewMilliseconds>900000</MaxAllowedSkewMilliseconds>"
        ),
        with_body=with_body,
    )


def damaged_head(fault: Fault, answer: Head) -> Head:
    """The head as the fault leaves it; answers that carry no object keep theirs."""
    if answer.status not in {200, 206}:
        return answer
    match fault.kind:
        case FaultKind.STALE:
            etag = hashlib.md5((answer.get("etag") or "").encode(), usedforsecurity=False)
            # A stale copy's checksums would be right for what it holds.
            return answer.without("x-amz-checksum-").changed("etag", f'"{etag.hexdigest()}"')
        case FaultKind.WRONG_LENGTH if answer.length is not None:
            length = max(0, answer.length + fault.by)
            return answer.changed("content-length", str(length))
        case FaultKind.WRONG_RANGE:
            match = _CONTENT_RANGE.fullmatch(answer.get("content-range") or "")
            if match is None:
                return answer
            first, last = int(match[1]) + fault.by, int(match[2]) + fault.by
            return answer.changed("content-range", f"bytes {first}-{last}/{match[3]}")
        case FaultKind.NO_ETAG:
            return answer.without("etag")
        case FaultKind.RANGE_AS_200:
            return replace(answer, start=status_line(200))
        case _:
            return answer


def damaged_body(
    fault: Fault, answer: Head, pieces: Iterator[bytes], length: int | None
) -> Iterator[bytes]:
    """The body's bytes as the fault leaves them; `length` is None where only its end will tell."""
    if fault.kind is FaultKind.FLIP:
        at = within(fault.at, length)
        flipped = split_at(pieces, at)
        return (
            piece[:1].translate(_INVERTED) + piece[1:] if start == at else piece
            for start, piece in flipped
        )
    if answer.status not in {200, 206} or length == 0:
        return pieces
    if fault.kind is FaultKind.STALE:
        return (piece.translate(_INVERTED) for piece in pieces)
    if fault.kind is FaultKind.WRONG_LENGTH:
        return _lengthened(pieces, fault.by) if fault.by > 0 else _shortened(pieces, -fault.by)
    return pieces


def split_at(pieces: Iterable[bytes], at: int) -> Iterator[tuple[int, bytes]]:
    """The same bytes, each piece with its place in the body, cut so that one begins at `at`."""
    start = 0
    for piece in pieces:
        cut = at - start
        if 0 < cut < len(piece):
            yield start, piece[:cut]
            start, piece = at, piece[cut:]
        yield start, piece
        start += len(piece)


def _lengthened(pieces: Iterator[bytes], by: int) -> Iterator[bytes]:
    yield from pieces
    yield bytes(by)


def _shortened(pieces: Iterator[bytes], by: int) -> Iterator[bytes]:
    held = b""
    for piece in pieces:
        held += piece
        keep = max(0, len(held) - by)
        if keep:
            yield held[:keep]
        held = held[keep:]


def within(at: int, length: int | None) -> int:
    return at if length is None else min(at, max(0, length - 1))
