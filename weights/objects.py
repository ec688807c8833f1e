"""GETs against one bucket, signed here and read over keep-alive connections: small objects whole, ranges in parts.

What boto3 does for everything else, this does for reading: at the speed of the wire, and without boto3's second of
imports before the first byte. A failure leaves here as a `BucketError` that names the object, or as a
`TransportError` where asking again may help.
"""

from __future__ import annotations

import contextlib
import logging
import random
import re
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

from s3.endpoint import endpoint_of, proxy_authorization, proxy_for
from s3.signing import Credentials, CredentialsError, Signer, credentials_of, region_of
from s3.words import (
    CERTIFICATE_REFUSED,
    UNREACHED,
    Explanation,
    error_in,
    explain_answer,
    seconds_to_wait,
    usual_code,
)
from weights.errors import BucketError, CorruptObjectError, ObjectChangedError, OversizedError
from weights.tls import TlsContext, tls_context
from weights.transport import (
    Address,
    BrokenError,
    CertificateError,
    Connection,
    Head,
    Patience,
    StalledError,
    TransportError,
    UnreachableError,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from s3.endpoint import Endpoint
    from settings import StorageSettings

UNREACHABLE = "Unreachable"  # our code for a request that got no answer at all
ATTEMPTS = 5  # at a small object
LONGEST_PAUSE = 20.0  # seconds; also what is made of a Retry-After beyond it
ERROR_LIMIT = 64 * 1024  # bytes of an error document
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")

logger = logging.getLogger(__name__)


class BusyError(TransportError):
    """The server is there and asks for patience; `pause` is how many seconds it wants, None if it does not say."""

    def __init__(self, message: str, pause: float | None, *, throttled: bool) -> None:
        super().__init__(message)
        self.pause = pause
        self.throttled = throttled


def pause_after(attempt: int, error: Exception, patience: Patience) -> float:
    """Seconds to wait after the failed attempt number `attempt`: what the server asked for, or more each time.

    Jittered, so that many readers that failed together do not come back together.
    """
    asked = error.pause if isinstance(error, BusyError) else None
    if asked is not None:
        return min(asked, LONGEST_PAUSE) * random.uniform(1.0, 1.25)
    doubled: float = patience.pause * 2 ** (attempt - 1)
    return min(doubled, LONGEST_PAUSE) * random.uniform(0.5, 1.5)


@dataclass(frozen=True)
class SmallObject:
    """A small object's bytes, and its ETag without quotes; None where the server gave none."""

    data: bytes
    etag: str | None


class RangeAnswer:
    """The body of one ranged GET. `start` is where it begins in the object: 0 where the server ignored the range."""

    def __init__(self, connection: Connection, etag: str, start: int) -> None:
        self.connection = connection
        self.etag = etag
        self.start = start

    def read(self, into: memoryview) -> int:
        """At least a byte of the body, in its order. Raises TransportError."""
        return self.connection.read(into)


class ObjectReader:
    """Reads one bucket's objects. Safe to use from many threads; keeps the connections they leave behind."""

    def __init__(
        self,
        endpoint: Endpoint,
        signer: Signer,
        bucket: str,
        patience: Patience | None = None,
        *,
        keypair: Credentials | None = None,
    ) -> None:
        self.bucket = bucket
        self.endpoint = endpoint
        self.signer = signer
        self.keypair = keypair  # None: the machine's own role decides, anew for each request
        self.patience = patience or Patience()
        self._tls: TlsContext | None = None
        self._idle: list[Connection] = []
        self._lock = threading.Lock()

    @staticmethod
    def from_settings(
        settings: StorageSettings, bucket: str, patience: Patience | None = None
    ) -> ObjectReader:
        """The reader that these settings describe. Raises SettingsError, and BucketError where there are no keys."""
        credentials = credentials_of(settings)
        return ObjectReader(
            endpoint_of(settings),
            Signer(credentials, region_of(settings)),
            bucket,
            patience,
            keypair=credentials() if settings.access_key_id else None,
        )

    @property
    def secure(self) -> bool:
        """Whether bytes come over TLS, which costs the interpreter far more calls than a plain connection."""
        return self.endpoint.scheme == "https"

    def url(self, key: str) -> str:
        """The object's name for people: s3://bucket/key."""
        return f"s3://{self.bucket}/{key}"

    def get(self, key: str, *, limit: int) -> bytes:
        """A small object whole. Raises BucketError, and OversizedError when it has more than `limit` bytes."""
        found = self.get_if_changed(key, None, limit=limit)
        if found is None:
            raise BucketError(f"cannot read {self.url(key)}: the server says it has not changed")
        return found.data

    def get_if_changed(
        self,
        key: str,
        etag: str | None,
        *,
        limit: int,
        attempts: int = ATTEMPTS,
        wait: Callable[[float], object] | None = None,
    ) -> SmallObject | None:
        """A small object whole, or None when it still has `etag`. Raises what `get` raises.

        `wait` is called with the seconds between two attempts.
        """
        wait = wait or threading.Event().wait
        headers = {} if etag is None else {"If-None-Match": f'"{etag}"'}
        for attempt in range(1, attempts + 1):
            try:
                return self._get_once(key, headers, limit)
            except TransportError as error:
                if attempt == attempts or isinstance(error, CertificateError):
                    raise self.explained(key, error) from error
                pause = pause_after(attempt, error, self.patience)
                logger.warning("reading %s again in %.1f s: %s", self.url(key), pause, error)
                wait(pause)
        raise AssertionError("the last attempt returns or raises")

    def _get_once(self, key: str, headers: Mapping[str, str], limit: int) -> SmallObject | None:
        with self._asked(key, headers) as (connection, head):
            if head.status == 304:
                return None
            if head.length is not None and head.length > limit:
                raise OversizedError(
                    f"cannot read {self.url(key)}: it has {head.length} bytes where at most {limit} make sense. "
                    "It is not what it should be: publish the model again"
                )
            if head.length is None:
                raise BrokenError("its answer does not say how long it is")
            data = connection.read_rest(limit + 1)
            if len(data) > limit:
                raise OversizedError(
                    f"cannot read {self.url(key)}: it has more than {limit} bytes. "
                    "It is not what it should be: publish the model again"
                )
            etag = head.get("ETag")
            return SmallObject(data, None if etag is None else etag.strip('"'))

    @contextlib.contextmanager
    def open_range(
        self,
        key: str,
        start: int,
        end: int,
        *,
        size: int,
        etag: str | None,
        on_connection: Callable[[Connection], None] | None = None,
    ) -> Iterator[RangeAnswer]:
        """Ask for bytes [start, end) of an object of `size` bytes that must have `etag` (None: any).

        The ETag of the answer is compared here, since caches in front of S3 ignore If-Match. `on_connection` is told
        of the connection before anything is sent, so that another thread can abort it. Raises TransportError,
        BucketError, ObjectChangedError when the object was replaced, CorruptObjectError when it has another size.
        """
        headers = {"Range": f"bytes={start}-{end - 1}"}
        if etag:
            headers["If-Match"] = f'"{etag}"'
        with self._asked(key, headers, on_connection) as (connection, head):
            if head.status == 304:
                raise BucketError(
                    f"cannot read {self.url(key)}: the server says it has not changed"
                )
            yield RangeAnswer(connection, *self._check(key, head, start, end, size, etag))

    def close(self) -> None:
        """Let the idle connections go."""
        with self._lock:
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()

    def explained(self, key: str, error: TransportError, doing: str = "read") -> BucketError:
        """The BucketError that a transport's failure comes to when nobody asks again any more."""
        what: Explanation
        if isinstance(error, CertificateError):
            what = Explanation(f"{CERTIFICATE_REFUSED.cause} ({error})", CERTIFICATE_REFUSED.advice)
        elif isinstance(error, UnreachableError):
            what = UNREACHED
        elif isinstance(error, BusyError):
            what = (
                explain_answer("SlowDown", "", "")
                if error.throttled
                else Explanation(
                    f"the server keeps failing ({error})",
                    "Try again; if it stays, ask your provider",
                )
            )
        else:
            what = Explanation(
                f"the connection failed ({error})",
                "Try again; if it stays, check AWS_ENDPOINT_URL_S3 and the network",
            )
        return BucketError(f"cannot {doing} {self.url(key)}: {what}", UNREACHABLE)

    @contextlib.contextmanager
    def _asked(
        self,
        key: str,
        headers: Mapping[str, str],
        on_connection: Callable[[Connection], None] | None = None,
    ) -> Iterator[tuple[Connection, Head]]:
        """Send a signed GET and check its status; the connection is kept when its answer was read to the end."""
        connection, head, clock_offset = self._request(key, headers, on_connection)
        try:
            if head.status in (200, 206, 304):
                yield connection, head
            else:
                raise self._refusal(key, connection, head, clock_offset)
        finally:
            self._keep(connection)

    def _request(
        self,
        key: str,
        headers: Mapping[str, str],
        on_connection: Callable[[Connection], None] | None,
    ) -> tuple[Connection, Head, float]:
        """Sign and send; the connection, the answer's head, and the clock offset that it was signed with."""
        place = self.endpoint.place(self.bucket, key)
        while True:
            with self._lock:
                connection = self._idle.pop() if self._idle else None
            fresh = connection is None
            connection = connection or self._connection(place.connect_host, place.port)
            if on_connection:
                on_connection(connection)
            offset = self.signer.clock_offset
            try:
                signed = self.signer.headers("GET", place.host_header, place.path, "", headers)
            except CredentialsError as error:
                raise BucketError(str(error)) from error
            try:
                return connection, connection.request(place.path, signed), offset
            except TransportError as error:
                connection.close()
                # A kept connection may have been closed by the server meanwhile, which says nothing of the server.
                if fresh or connection.aborted:
                    raise
                if isinstance(
                    error, StalledError
                ):  # flows that a firewall forgot: the others are no better
                    self.close()
                    raise

    def _connection(self, host: str, port: int) -> Connection:
        scheme = self.endpoint.scheme
        if self.secure and self._tls is None:
            try:
                self._tls = tls_context()
            except OSError as error:
                raise CertificateError(f"AWS_CA_BUNDLE cannot be used: {error}") from error
        address = Address(
            scheme, host, port, proxy_for(scheme, host), proxy_authorization(scheme, host)
        )
        return Connection(address, self._tls, self.patience)

    def _keep(self, connection: Connection) -> None:
        if connection.reusable:
            with self._lock:
                self._idle.append(connection)
        else:
            connection.close()

    def _refusal(
        self, key: str, connection: Connection, head: Head, clock_offset: float
    ) -> Exception:
        """What an answer other than 200, 206 or 304 means; reads its error document."""
        document = connection.read_rest(ERROR_LIMIT).decode("utf-8", "replace")
        told, message = error_in(document)
        code = usual_code(told or str(head.status))
        if code == "RequestTimeTooSkewed" and self.signer.has_corrected(
            head.get("Date"), clock_offset
        ):
            return BusyError("the clock here was off, and is corrected", 0.0, throttled=False)
        throttled = head.status == 429 or code in ("SlowDown", "TooManyRequests", "Throttling")
        if throttled or head.status >= 500 or code == "RequestTimeout":
            return BusyError(
                f"{head.status} {told}".strip(),
                seconds_to_wait(head.get("Retry-After"), head.get("Date")),
                throttled=throttled,
            )
        if code == "PreconditionFailed":
            return self._replaced(key, "another", "the one it had")
        what = explain_answer(code, head.status, message)
        return BucketError(f"cannot read {self.url(key)}: {what}", code)

    def _check(
        self, key: str, head: Head, start: int, end: int, size: int, etag: str | None
    ) -> tuple[str, int]:
        """The answer's ETag, and the place in the object where its body begins."""
        got = (head.get("ETag") or "").strip('"')
        if not got or head.length is None:
            raise BucketError(
                f"cannot read {self.url(key)}: the answer has no ETag or no Content-Length, so it cannot be "
                "trusted. Check the proxy or cache in front of the bucket"
            )
        if etag and got != etag:
            raise self._replaced(key, got, etag)
        # Some servers answer 200 with a right Content-Range; what counts is the range, not the status.
        content_range = _CONTENT_RANGE.fullmatch(head.get("Content-Range") or "")
        if content_range is None:
            if head.status != 200:
                raise BucketError(
                    f"cannot read {self.url(key)}: the answer does not say which range it is. "
                    "Check the proxy or cache in front of the bucket"
                )
            if head.length != size:
                raise self._another_size(key, head.length, size)
            return got, 0
        first, last, total = content_range.groups()
        if total not in ("*", str(size)):
            raise self._another_size(key, int(total), size)
        if (int(first), int(last), head.length) != (start, end - 1, end - start):
            raise BucketError(
                f"cannot read {self.url(key)}: asked for bytes {start}-{end - 1}, got {first}-{last} in "
                f"{head.length} bytes. Try again; if it stays, check the proxy or cache in front of the bucket"
            )
        return got, start

    def _another_size(self, key: str, found: int, size: int) -> CorruptObjectError:
        return CorruptObjectError(
            f"{self.url(key)} has {found} bytes where {size} were published: it was truncated or replaced. "
            "Publish the model again"
        )

    def _replaced(self, key: str, got: str, etag: str) -> ObjectChangedError:
        return ObjectChangedError(
            f"{self.url(key)} was replaced while it was read (ETag {got}, before {etag}). "
            "A published version is never overwritten: load again, or publish the model again"
        )
