"""Small requests to S3 on the event loop: signed here, sent by aiohttp, and sent again where that may help.

For what many callers wait for at once. A record's PUT takes 0.4 ms of a core this way; with boto3 it takes 1.2, and
more than 2 with the thread that boto3 needs beside an event loop (2 cores of 2026).
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import random
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Self
from urllib.parse import quote, unquote_plus
from xml.etree import ElementTree as ET

import aiohttp
from yarl import URL

from s3.client import ATTEMPTS, CONNECT_TIMEOUT, READ_TIMEOUT
from s3.endpoint import Place, ca_bundle, endpoint_of, proxy_authorization, proxy_for
from s3.signing import CredentialsError, Signer, check_profile, credentials_of, region_of
from s3.words import (
    CERTIFICATE_REFUSED,
    UNREACHED,
    Explanation,
    connection_failed,
    error_in,
    explain_answer,
    seconds_to_wait,
    usual_code,
)

if TYPE_CHECKING:
    from types import TracebackType

    from settings import StorageSettings

FIRST_PAUSE_S = 0.2  # doubled before each further attempt
LONGEST_PAUSE_S = 20.0  # also what is made of a Retry-After beyond it
CLOCK_STEP_S = 0.25  # a correction by less would change nothing
LARGEST_ANSWER = 8 * 1024 * 1024  # bytes; a list of 1000 keys has at most 4 MiB, percent-encoded
LARGEST_HASHED_HERE = 256 * 1024  # bytes; SHA-256 takes 0.2 ms for them
_BUSY_STATUS = (429, 500, 502, 503, 504)
_BUSY_CODES = ("SlowDown", "TooManyRequests", "Throttling", "RequestTimeout", "InternalError")
_SKEWED = "RequestTimeTooSkewed"

_log = logging.getLogger(__name__)


class S3Error(Exception):
    """S3 has refused, or has not answered. `code` is what `usual_code` makes of its own, "" without an answer."""

    def __init__(self, code: str, explanation: Explanation) -> None:
        super().__init__(str(explanation))
        self.code = code


class _AgainError(Exception):
    """Asking again may help, after `pause` seconds where the server says so; else it is `finally_`."""

    def __init__(self, finally_: S3Error, pause: float | None = None) -> None:
        super().__init__(str(finally_))
        self.finally_ = finally_
        self.pause = pause


@dataclass(frozen=True)
class Answer:
    """What S3 answered with a status below 300. The names of `headers` may be asked for in any case."""

    headers: Mapping[str, str]
    body: bytes


@dataclass(frozen=True)
class Listing:
    """Keys in their order, and whether there are more."""

    keys: tuple[str, ...]
    is_truncated: bool


class AsyncClient:
    """An S3 server as `settings` describe it, for at most `connections` requests at once on one event loop.

    Each attempt may be two requests: where a connection breaks before an answer, aiohttp asks once more by itself. So
    a conditional write that was done may be answered as one that came too late. Every method raises S3Error. Close it,
    or use it with `async with`.
    """

    def __init__(
        self,
        settings: StorageSettings,
        *,
        connections: int = 32,
        attempts: int = ATTEMPTS,
        read_timeout: float = READ_TIMEOUT,
    ) -> None:
        """`read_timeout` is in seconds without a byte, for each of the `attempts`.

        Raises SettingsError for an AWS profile that is not there, and for a proxy that cannot be used.
        """
        self._endpoint = endpoint_of(settings)
        self._signer = Signer(credentials_of(settings), region_of(settings))
        # The machine's own may have to be fetched, which must not hold up everybody else.
        self._may_block = settings.access_key_id is None
        if self._may_block:
            check_profile()
        self._attempts = attempts
        self._connections = connections
        self._timeout = aiohttp.ClientTimeout(
            total=None, sock_connect=CONNECT_TIMEOUT, sock_read=read_timeout
        )
        self._session: aiohttp.ClientSession | None = None
        self._proxies: dict[str, tuple[str | None, dict[str, str]]] = {}
        self._proxy(self._endpoint.host)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    async def put(self, bucket: str, key: str, data: bytes, headers: Mapping[str, str]) -> str:
        """Write an object, and return its ETag as the server quotes it."""
        answer = await self._ask("PUT", self._endpoint.place(bucket, key), headers, data)
        etag = answer.headers.get("ETag")
        if not etag:
            raise S3Error(
                "",
                Explanation(
                    "the answer has no ETag", "Check the proxy or cache in front of the bucket"
                ),
            )
        return etag

    async def get(self, bucket: str, key: str, *, limit: int) -> Answer:
        """A small object whole. One of more than `limit` bytes is an error."""
        return await self._ask("GET", self._endpoint.place(bucket, key), {}, limit=limit)

    async def list_keys(self, bucket: str, prefix: str, *, after: str, limit: int) -> Listing:
        """At most `limit` keys (1 to 1000) under `prefix` that come after `after`."""
        asked = {
            "encoding-type": "url",  # XML cannot express every key
            "list-type": "2",
            "max-keys": str(limit),
            "prefix": prefix,
            **({"start-after": after} if after else {}),
        }
        query = "&".join(f"{name}={quote(value, safe='')}" for name, value in asked.items())
        answer = await self._ask("GET", self._endpoint.place(bucket, ""), {}, query=query)
        return _listing(answer.body)

    async def _ask(
        self,
        method: str,
        place: Place,
        headers: Mapping[str, str],
        body: bytes = b"",
        *,
        query: str = "",
        limit: int = LARGEST_ANSWER,
    ) -> Answer:
        for attempt in range(1, self._attempts + 1):
            try:
                return await self._ask_once(method, place, headers, body, query, limit)
            except _AgainError as again:
                if attempt == self._attempts:
                    raise again.finally_ from again.__cause__
                await asyncio.sleep(_pause(attempt, again.pause))
        raise AssertionError("the last attempt returns or raises")

    async def _ask_once(
        self,
        method: str,
        place: Place,
        headers: Mapping[str, str],
        body: bytes,
        query: str,
        limit: int,
    ) -> Answer:
        offset = self._signer.clock_offset
        sent = await self._signed(method, place, query, headers, body)
        host = f"[{place.connect_host}]" if ":" in place.connect_host else place.connect_host
        target = f"{self._endpoint.scheme}://{host}:{place.port}{place.path}"
        proxy, for_proxy = self._proxy(place.connect_host)
        if (
            self._endpoint.scheme == "http"
        ):  # there is no tunnel: the proxy reads the request itself
            sent |= for_proxy
        try:
            async with self._opened().request(
                method,
                URL(f"{target}?{query}" if query else target, encoded=True),
                data=body if method == "PUT" else None,
                headers=sent,
                allow_redirects=False,
                proxy=proxy,
                proxy_headers=for_proxy,
            ) as answer:
                data = await _read(answer, limit)
                if answer.status < HTTPStatus.MULTIPLE_CHOICES:
                    return Answer(answer.headers, data)
                raise self._refusal(answer, data, offset)
        except (aiohttp.ClientSSLError, ssl.SSLError) as error:
            raise S3Error("", CERTIFICATE_REFUSED) from error
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            raise _AgainError(S3Error("", UNREACHED)) from error
        except (aiohttp.ClientError, OSError) as error:  # a TimeoutError is an OSError
            raise _AgainError(S3Error("", connection_failed(error))) from error

    async def _signed(
        self, method: str, place: Place, query: str, headers: Mapping[str, str], body: bytes
    ) -> dict[str, str]:
        def sign() -> dict[str, str]:
            digest = hashlib.sha256(body).hexdigest()
            return self._signer.headers(
                method, place.host_header, place.path, query, headers, payload_sha256=digest
            )

        try:
            takes_long = self._may_block or len(body) > LARGEST_HASHED_HERE
            return await asyncio.to_thread(sign) if takes_long else sign()
        except CredentialsError as error:
            raise S3Error("", error.explanation) from error

    def _opened(self) -> aiohttp.ClientSession:
        if self._session is None:
            secure = self._endpoint.scheme == "https"
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(
                    limit=self._connections, ssl=_trusting(ca_bundle()) if secure else True
                ),
                timeout=self._timeout,
                cookie_jar=aiohttp.DummyCookieJar(),
                headers={"Accept-Encoding": "identity"},
                auto_decompress=False,  # an object is what its bytes are
                skip_auto_headers=("User-Agent", "Content-Type"),
            )
        return self._session

    def _proxy(self, host: str) -> tuple[str | None, dict[str, str]]:
        """The proxy on the way to a host, if there is one, and the headers for it."""
        if host not in self._proxies:
            scheme = self._endpoint.scheme
            found = proxy_for(scheme, host)
            header = proxy_authorization(scheme, host)
            self._proxies[host] = (
                None if found is None else f"http://{found[0]}:{found[1]}",
                {} if header is None else {"Proxy-Authorization": header},
            )
        return self._proxies[host]

    def _refusal(self, answer: aiohttp.ClientResponse, body: bytes, offset: float) -> Exception:
        told, message = error_in(body.decode("utf-8", "replace"))
        code = usual_code(told or str(answer.status))
        refused = S3Error(code, explain_answer(code, answer.status, message))
        if code == _SKEWED and self._clock_adjusted(answer.headers.get("Date"), offset):
            return _AgainError(refused, 0.0)
        if answer.status in _BUSY_STATUS or code in _BUSY_CODES:
            fields = answer.headers
            pause = seconds_to_wait(fields.get("Retry-After"), fields.get("Date"))
            return _AgainError(refused, pause)
        return refused

    def _clock_adjusted(self, date: str | None, offset: float) -> bool:
        """Sign with the server's time from now on; False where that is what was done and did not help."""
        if self._signer.clock_offset != offset:
            return True  # another request has met the same, and seen to it
        self._signer.adjust_clock(date or "")
        if abs(self._signer.clock_offset - offset) <= CLOCK_STEP_S:
            return False
        _log.warning(
            "this machine's clock is %.0f s off the server's: signing with the server's time. Set the clock (NTP)",
            self._signer.clock_offset,
        )
        return True


async def _read(answer: aiohttp.ClientResponse, limit: int) -> bytes:
    """The body, which an error's need not be whole."""
    is_refusal = answer.status >= HTTPStatus.MULTIPLE_CHOICES
    most = LARGEST_ANSWER if is_refusal else limit
    size = answer.content_length
    if is_refusal or size is None or size <= most:
        data = bytearray()
        async for piece in answer.content.iter_any():
            data += piece
            if len(data) > most:
                break
        if is_refusal or len(data) <= most:
            return bytes(data[:most])
    raise S3Error(
        "EntityTooLarge",
        Explanation(
            f"it has {size or f'more than {limit}'} bytes, and {limit} are the most",
            "Something else wrote it: look at it and move it away",
        ),
    )


def _trusting(bundle: str) -> ssl.SSLContext:
    """Raises S3Error for a bundle that cannot be used."""
    is_folder = Path(bundle).is_dir()
    try:
        return ssl.create_default_context(
            cafile=None if is_folder else bundle, capath=bundle if is_folder else None
        )
    except OSError as error:
        raise S3Error(
            "",
            Explanation(
                f"AWS_CA_BUNDLE cannot be used ({error})",
                "Unset it, or name a file of certificates",
            ),
        ) from error


def _pause(attempt: int, asked: float | None) -> float:
    """Seconds before the next attempt. Jittered, so that many that failed together do not come back together."""
    if asked is not None:
        return min(asked, LONGEST_PAUSE_S) * random.uniform(1.0, 1.25)
    doubled: float = FIRST_PAUSE_S * 2 ** (attempt - 1)
    return min(doubled, LONGEST_PAUSE_S) * random.uniform(0.5, 1.5)


def _listing(document: bytes) -> Listing:
    # As botocore parses it, too. Expat limits what entities may grow to, and the server is the owner's own.
    no_list = S3Error(
        "",
        Explanation(
            "the answer is no list of objects",
            "Check AWS_ENDPOINT_URL_S3, and the proxy or cache in front of the bucket",
        ),
    )
    try:
        root = ET.fromstring(document)  # noqa: S314
    except (ET.ParseError, LookupError, ValueError) as error:  # no XML, or in no encoding
        raise no_list from error
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]  # AWS names its namespace, others none
    if root.tag != "ListBucketResult":
        raise no_list
    decode = unquote_plus if root.findtext("EncodingType") == "url" else str
    keys = tuple(decode(key.text or "") for key in root.iterfind("Contents/Key"))
    return Listing(keys, root.findtext("IsTruncated") == "true")
