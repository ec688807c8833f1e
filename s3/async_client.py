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
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self, TypeVar
from urllib.parse import quote, unquote_plus
from xml.etree import ElementTree as ET

import aiohttp
from yarl import URL

from s3.client import ATTEMPTS, CONNECT_TIMEOUT, READ_TIMEOUT
from s3.endpoint import (
    Endpoint,
    Place,
    Scheme,
    ca_bundle,
    endpoint_of,
    proxy_authorization,
    proxy_for,
)
from s3.signing import CredentialsError, Signer, check_profile, credentials_of, region_of
from s3.words import (
    CERTIFICATE_REFUSED,
    UNREACHED,
    Explanation,
    connection_failed,
    error_in,
    explain_answer,
    region_in,
    seconds_to_wait,
    usual_code,
)

if TYPE_CHECKING:
    from types import TracebackType

    from settings import StorageSettings

FIRST_PAUSE_S = 0.2  # doubled before each further attempt
LONGEST_PAUSE_S = 20.0
LARGEST_ANSWER = 8 * 1024 * 1024  # bytes; a list of 1000 keys has at most 4 MiB, percent-encoded
LARGEST_HASHED_HERE = 256 * 1024  # bytes; SHA-256 takes 0.2 ms for them
SIGNING_THREADS = 4
USER_AGENT = f"lightning-in-a-bucket aiohttp/{aiohttp.__version__}"
_BUSY_STATUS = (429, 500, 502, 503, 504)
_BUSY_CODES = ("SlowDown", "TooManyRequests", "Throttling", "RequestTimeout", "InternalError")
_SKEWED = "RequestTimeTooSkewed"
_ELSEWHERE = ("PermanentRedirect", "TemporaryRedirect", "AuthorizationHeaderMalformed")

Got = TypeVar("Got")

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


@dataclass(frozen=True)
class _Request:
    method: Literal["GET", "PUT"]
    bucket: str
    key: str = ""
    query: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""
    limit: int = LARGEST_ANSWER


@dataclass(frozen=True)
class _Server:
    """Where a bucket is asked for, and what its requests are signed with."""

    endpoint: Endpoint
    signer: Signer


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
        longest_pause: float = LONGEST_PAUSE_S,
    ) -> None:
        """`read_timeout` is in seconds without a byte; each attempt may take twice that and the time to connect. A
        server that asks for more than `longest_pause` seconds is not asked again.

        Raises SettingsError for an AWS profile that is not there, and for a proxy that cannot be used.
        """
        if settings.access_key_id is None:
            check_profile()
        self._settings = settings
        self._credentials = credentials_of(settings)
        self._server = self._server_in(settings)
        self._elsewhere: dict[str, _Server] = {}
        self._attempts = attempts
        self._attempt_s = CONNECT_TIMEOUT + 2 * read_timeout
        self._longest_pause = longest_pause
        self._connections = connections
        self._timeout = aiohttp.ClientTimeout(
            total=None, sock_connect=CONNECT_TIMEOUT, sock_read=read_timeout
        )
        self._session: aiohttp.ClientSession | None = None
        self._threads = ThreadPoolExecutor(SIGNING_THREADS, thread_name_prefix="s3-signing")
        self._is_closed = False
        self._proxies: dict[str, tuple[str | None, dict[str, str]]] = {}
        self._proxy(self._server.endpoint.scheme, self._server.endpoint.host)

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
        """Let the connections go, and wait for nobody who looks for credentials. What is asked from now on fails."""
        self._is_closed = True
        self._threads.shutdown(wait=False, cancel_futures=True)
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    async def put(self, bucket: str, key: str, data: bytes, headers: Mapping[str, str]) -> str:
        """Write an object, and return its ETag as the server quotes it."""
        answer = await self._ask(_Request("PUT", bucket, key, headers=headers, body=data))
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
        return await self._ask(_Request("GET", bucket, key, limit=limit))

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
        answer = await self._ask(_Request("GET", bucket, query=query))
        return _listing(answer.body)

    async def _ask(self, request: _Request) -> Answer:
        for attempt in range(1, self._attempts + 1):
            try:
                async with asyncio.timeout(self._attempt_s):
                    return await self._ask_once(request)
            except _AgainError as again:
                failure, pause, cause = again.finally_, again.pause, again.__cause__
            except asyncio.CancelledError:
                # Closing cancels who waits for a connection or a thread, though nobody has cancelled the caller.
                task = asyncio.current_task()
                if self._is_closed and task is not None and not task.cancelling():
                    raise _closed() from None
                raise
            except TimeoutError as error:
                failure, pause, cause = S3Error("", connection_failed(error)), None, error
            if attempt == self._attempts or (pause or 0.0) > self._longest_pause:
                raise failure from cause
            await asyncio.sleep(_pause(attempt, pause, self._longest_pause))
        raise AssertionError("the last attempt returns or raises")

    async def _ask_once(self, request: _Request) -> Answer:
        server = self._elsewhere.get(request.bucket, self._server)
        scheme, offset = server.endpoint.scheme, server.signer.clock_offset
        place = server.endpoint.place(request.bucket, request.key)
        sent = await self._signed(server.signer, place, request)
        proxy, for_proxy = self._proxy(scheme, place.connect_host)
        if scheme == "http":
            sent |= for_proxy  # there is no tunnel: the proxy reads the request itself
        host = f"[{place.connect_host}]" if ":" in place.connect_host else place.connect_host
        query = f"?{request.query}" if request.query else ""
        try:
            async with self._opened().request(
                request.method,
                URL(f"{scheme}://{host}:{place.port}{place.path}{query}", encoded=True),
                data=request.body if request.method == "PUT" else None,
                headers=sent,
                allow_redirects=False,
                proxy=proxy,
                proxy_headers=for_proxy,
            ) as answer:
                data = await _read(answer, request.limit)
        except (aiohttp.ClientConnectorCertificateError, ssl.SSLCertVerificationError) as error:
            raise S3Error("", CERTIFICATE_REFUSED) from error
        except (aiohttp.ClientSSLError, ssl.SSLError) as error:
            raise _AgainError(S3Error("", CERTIFICATE_REFUSED)) from error
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            raise _AgainError(S3Error("", UNREACHED)) from error
        except (aiohttp.ClientError, OSError) as error:
            raise _AgainError(S3Error("", connection_failed(error))) from error
        if answer.status < HTTPStatus.MULTIPLE_CHOICES:
            return Answer(answer.headers, data)
        raise await self._refusal(request.bucket, server.signer, offset, answer, data)

    async def _signed(self, signer: Signer, place: Place, request: _Request) -> dict[str, str]:
        def sign() -> dict[str, str]:
            return signer.headers(
                request.method,
                place.host_header,
                place.path,
                request.query,
                request.headers,
                payload_sha256=hashlib.sha256(request.body).hexdigest(),
            )

        try:
            if self._credentials.is_at_hand and len(request.body) <= LARGEST_HASHED_HERE:
                return sign()
            return await self._on_thread(sign)
        except CredentialsError as error:
            raise S3Error("", error.explanation) from error

    async def _refusal(
        self,
        bucket: str,
        signer: Signer,
        offset: float,
        answer: aiohttp.ClientResponse,
        body: bytes,
    ) -> Exception:
        document, fields = body.decode("utf-8", "replace"), answer.headers
        told, message = error_in(document)
        code = usual_code(told or str(answer.status))
        refused = S3Error(code, explain_answer(code, answer.status, message))
        if code == _SKEWED and signer.has_corrected(fields.get("Date"), offset):
            return _AgainError(refused, 0.0)
        region = fields.get("x-amz-bucket-region") or region_in(document)
        if code in _ELSEWHERE and region and region != signer.region:
            moved = self._settings.model_copy(update={"region": region})
            self._elsewhere[bucket] = await self._on_thread(
                lambda: self._server_in(moved, signer.clock_offset)
            )
            _log.info("bucket %s is in region %s", bucket, region)
            return _AgainError(refused, 0.0)
        if answer.status in _BUSY_STATUS or code in _BUSY_CODES:
            return _AgainError(
                refused, seconds_to_wait(fields.get("Retry-After"), fields.get("Date"))
            )
        return refused

    def _server_in(self, settings: StorageSettings, clock_offset: float = 0.0) -> _Server:
        signer = Signer(self._credentials, region_of(settings), clock_offset)
        return _Server(endpoint_of(settings), signer)

    async def _on_thread(self, work: Callable[[], Got]) -> Got:
        if self._is_closed:
            raise _closed()
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    def _opened(self) -> aiohttp.ClientSession:
        if self._is_closed:
            raise _closed()
        if self._session is None:
            secure = self._server.endpoint.scheme == "https"
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(
                    limit=self._connections, ssl=_trusting(ca_bundle()) if secure else True
                ),
                timeout=self._timeout,
                cookie_jar=aiohttp.DummyCookieJar(),
                headers={"Accept-Encoding": "identity", "User-Agent": USER_AGENT},
                auto_decompress=False,  # an object is what its bytes are
                skip_auto_headers=("Content-Type",),
            )
        return self._session

    def _proxy(self, scheme: Scheme, host: str) -> tuple[str | None, dict[str, str]]:
        """The proxy on the way to a host, if there is one, and the headers for it."""
        if host not in self._proxies:
            found = proxy_for(scheme, host)
            header = proxy_authorization(scheme, host)
            self._proxies[host] = (
                None if found is None else f"http://{found[0]}:{found[1]}",
                {} if header is None else {"Proxy-Authorization": header},
            )
        return self._proxies[host]


def _closed() -> S3Error:
    return S3Error("", Explanation("the client is closed", "This server is stopping: ask another"))


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


def _pause(attempt: int, asked: float | None, longest: float) -> float:
    """Seconds before the next attempt. Jittered, so that many that failed together do not come back together."""
    if asked is not None:
        return asked * random.uniform(1.0, 1.25)
    doubled: float = FIRST_PAUSE_S * 2 ** (attempt - 1)
    return min(doubled, longest) * random.uniform(0.5, 1.5)


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
