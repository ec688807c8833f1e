"""Telling a prediction's caller, at a URL of theirs, what became of it: signed as Standard Webhooks asks, and retried.

When something is due to be told is decided elsewhere, and which hosts may be reached in addresses.py. The client that
is handed in must not follow redirects, nor take a proxy from the environment.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import hashlib
import json
import logging
import random
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from http.cookiejar import DefaultCookiePolicy
from typing import Any, Final, Literal
from urllib.parse import urlsplit

import httpx
import standardwebhooks

from gateway.addresses import AddressRefused, Guard
from images.prediction import Webhook

WebhookEvent = Literal["start", "output", "logs", "completed"]

SECRET_PREFIX: Final = "whsec_"  # noqa: S105 - the standard's own, by which scanners know one
SECRET_BYTES: Final = range(24, 65)
LONGEST_URL: Final = 4096
RESOLVED_WITHIN_S: Final = 5.0
NOTED_LATE_S: Final = 15.0  # by a slow bucket, or another clock
LONGEST_REASON: Final = 200
USER_AGENT: Final = "lightning-in-a-bucket"

MAKE_SECRET: Final = f'This makes one: echo "{SECRET_PREFIX}$(openssl rand -base64 32)"'

_PLAIN_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
_RETRIED = frozenset({408, 429, *range(500, 600)})

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class WebhookPatience:
    """How long a receiver is waited for, in seconds, and how often the end of a prediction is told again.

    As they are, the pauses add up to six or seven minutes: enough for a receiver that is being deployed anew. One that
    is away for longer asks for the result itself.
    """

    attempt_s: float = 10.0
    attempts: int = 10
    first_pause_s: float = 1.0
    longest_pause_s: float = 120.0
    # Slow answers and Retry-After stretch it: no attempt begins later than this after the first.
    give_up_after_s: float = 600.0

    def pause_s(self, failed: int, asked_s: float) -> float:
        """The wait after the `failed`-th attempt (from 1), at least as long as the receiver asked, up to the longest.

        What chance adds keeps the many that one outage has met from coming back all at once.
        """
        doubled = self.first_pause_s * 2.0 ** (failed - 1)
        return min(max(doubled, asked_s), self.longest_pause_s) * random.uniform(1, 1.25)


@dataclass(frozen=True)
class _Message:
    """What is told, the same at every attempt."""

    id: str
    url: httpx.URL
    body: str
    """ASCII alone: what is signed, as text, is byte for byte what is sent."""

    def __str__(self) -> str:
        # Not the path: many services have the secret there.
        return f"webhook {self.id} to {self.url.scheme}://{self.url.netloc.decode('ascii')}"


@dataclass(frozen=True)
class _Outcome:
    """What came of one attempt."""

    delivered: bool
    said: str
    again: bool = False
    """Whether another attempt may fare better."""
    asked_s: float = 0.0
    """How long the receiver wants to be left alone."""


class Webhooks:
    """Sends webhooks. `client` keeps no cookies from then on: receivers are strangers, and get nothing to keep here.

    Raises ValueError for a secret or a token that cannot be used, without repeating it.
    """

    def __init__(
        self,
        client: httpx.AsyncClient,
        *,
        signing_secret: str | None = None,
        auth_token: str | None = None,
        patience: WebhookPatience = WebhookPatience(),
    ) -> None:
        self._client = client
        self._client.cookies.jar.set_policy(DefaultCookiePolicy(allowed_domains=()))
        self._signer = None
        if signing_secret is not None:
            _check("the webhooks' signing secret", check_secret, signing_secret)
            self._signer = standardwebhooks.Webhook(signing_secret)
        self._authorization: dict[str, str] = {}
        if auth_token is not None:
            _check("the webhooks' token", check_auth_token, auth_token)
            self._authorization = {"Authorization": f"Bearer {auth_token}"}
        self._patience = patience

    async def send(
        self,
        url: str,
        event: WebhookEvent,
        answer: dict[str, Any],
        number: int = 0,
        *,
        rerun: int = 0,
        before_more: Callable[[datetime], Awaitable[None]] | None = None,
    ) -> bool | None:
        """Whether the receiver has taken it (2xx), or None for a fault of ours.

        `completed` is tried again while that may help, the others are not. `number` tells messages apart that share
        prediction and event, and `rerun` those of a prediction that was begun anew after an end; the same four are the
        same message to whoever receives it, after a restart too. Before each pause, `before_more` hears when the
        attempt after it is over. Raises nothing but CancelledError.
        """
        name = message_id(str(answer.get("id")), event, number, rerun)
        try:
            # Escaped to ASCII, so that half a character, which JSON can spell and UTF-8 cannot, arrives too.
            body = json.dumps(answer, allow_nan=False, separators=(",", ":"))
            message = _Message(name, _parsed(url), body)
        except (ValueError, TypeError, RecursionError) as error:
            _log.warning("The webhook %s cannot be sent: %s.", name, error)
            return False
        try:
            return await self._deliver(message, event == "completed", before_more)
        except Exception:  # noqa: BLE001 - logged with its traceback
            # A prediction's end must not fail because the news of it did.
            _log.exception("The %s was not delivered, through a fault of this program.", message)
            return None

    async def _deliver(
        self,
        message: _Message,
        final: bool,
        before_more: Callable[[datetime], Awaitable[None]] | None,
    ) -> bool:
        attempts = self._patience.attempts if final else 1
        clock = asyncio.get_running_loop().time
        last_start = clock() + self._patience.give_up_after_s
        attempt = 0
        while True:
            attempt += 1
            outcome = await self._attempt(message)
            if outcome.delivered:
                level = logging.INFO if final else logging.DEBUG
                _log.log(level, "The %s was delivered, at attempt %d.", message, attempt)
                return True
            pause = self._patience.pause_s(attempt, outcome.asked_s)
            if not outcome.again or attempt >= attempts or clock() + pause > last_start:
                break
            _log.info(
                "The %s was not delivered: %s. Attempt %d of %d follows in %.3g s.",
                message,
                outcome.said,
                attempt + 1,
                attempts,
                pause,
            )
            if before_more is not None:
                next_over = pause + self._patience.attempt_s + NOTED_LATE_S
                await before_more(datetime.now(UTC) + timedelta(seconds=next_over))
            await asyncio.sleep(pause)
        if final:
            _log.warning(
                "The %s was not delivered and is given up, after attempt %d of %d: %s. "
                "Whoever waits for it can still ask with GET /predictions/<id>.",
                message,
                attempt,
                attempts,
                outcome.said,
            )
        else:
            _log.info("The %s was not delivered: %s.", message, outcome.said)
        return False

    async def _attempt(self, message: _Message) -> _Outcome:
        within = self._patience.attempt_s
        try:
            # The client's own timeouts are for one read or write each: a receiver that sends a byte now and then would
            # never meet one.
            async with (
                asyncio.timeout(within),
                self._client.stream(
                    "POST",
                    message.url,
                    content=message.body.encode("ascii"),
                    headers=self._headers(message),
                    timeout=within,
                    follow_redirects=False,
                ) as response,
            ):
                # Closed without having read any of it: it may be endless.
                return _outcome_of(response)
        except AddressRefused as error:
            return _Outcome(False, str(error).removesuffix("."))
        except (TimeoutError, httpx.TimeoutException):
            return _Outcome(False, f"there was no answer within {within:g} s", again=True)
        except httpx.ConnectError as error:
            said = str(error)[:LONGEST_REASON] or "nothing listens there"
            return _Outcome(False, said, again=True)
        except httpx.TransportError:
            # Not in the error's own words: it may quote what the receiver sent, and that our headers.
            return _Outcome(
                False, "the connection broke, or what came back is not HTTP", again=True
            )

    def _headers(self, message: _Message) -> dict[str, str]:
        # The attempt's own time, not the event's: receivers refuse what is more than some minutes old.
        now = datetime.now(UTC)
        headers = {
            "Content-Type": "application/json",
            "User-Agent": USER_AGENT,
            # An answer that is not read leaves a connection that nobody can use again.
            "Connection": "close",
            "webhook-id": message.id,
            "webhook-timestamp": str(int(now.timestamp())),
            **self._authorization,
        }
        if self._signer is not None:
            headers["webhook-signature"] = self._signer.sign(message.id, now, message.body)
        return headers


def due(webhook: Webhook, event: WebhookEvent) -> bool:
    """Whether whoever named the webhook wants to hear of such an event."""
    return webhook.events_filter is None or event in webhook.events_filter


def check_url(url: str) -> None:
    """Raises ValueError for what no webhook can be, in words for whoever sent it that repeat nothing of it."""
    _parsed(url)


async def check_reachable(guard: Guard, url: str) -> None:
    """Raises AddressRefused for a host that is not on the internet, and ValueError as `check_url` does.

    It is for an early, clear answer: what is connected to later is judged again then. A host that has no address now,
    or none in time, may have one when the prediction is done.
    """
    parsed = _parsed(url)
    port = parsed.port or (443 if parsed.scheme == "https" else 80)
    with contextlib.suppress(OSError):  # TimeoutError is one
        async with asyncio.timeout(RESOLVED_WITHIN_S):
            await guard.addresses(parsed.raw_host.decode("ascii"), port)


def check_secret(value: str) -> None:
    """A signing secret is `whsec_` and 24 to 64 bytes in base64.

    Raises ValueError with a message that continues the variable's name and repeats nothing of its value.
    """
    if not value.startswith(SECRET_PREFIX):
        raise ValueError(f"must be {SECRET_PREFIX} and a key in base64. {MAKE_SECRET}")
    try:
        # Strictly: readers of other languages do not pass over stray characters as Python's would.
        key = base64.b64decode(value.removeprefix(SECRET_PREFIX), validate=True)
    except (binascii.Error, ValueError):
        raise ValueError(
            f"must hold base64 after {SECRET_PREFIX}, with + and / and padding, and nothing else. {MAKE_SECRET}"
        ) from None
    if len(key) not in SECRET_BYTES:
        raise ValueError(
            f"must hold {SECRET_BYTES.start} to {SECRET_BYTES.stop - 1} bytes in base64 after {SECRET_PREFIX}, "
            f"and holds {len(key)}. {MAKE_SECRET}"
        )


def check_auth_token(value: str) -> None:
    """Whether an Authorization header can carry it. Raises ValueError as `check_secret` does."""
    if not re.fullmatch(r"[!-~]+", value):
        raise ValueError(
            "must be one or more printable ASCII characters without blanks, as it goes into a header"
        )


def message_id(prediction_id: str, event: WebhookEvent, number: int, rerun: int = 0) -> str:
    """The `webhook-id`: one for each message, and the same whenever and wherever that is sent again.

    The prediction's id stands in it where that is short and plain, and its SHA-256 otherwise. Dots are not plain: they
    part what is signed, and callers choose their ids.
    """
    name = prediction_id
    if not _PLAIN_ID.fullmatch(name):
        name = "sha256-" + hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()
    return f"{name}-{event}-{number}" + (f"-{rerun}" if rerun else "")


def retry_after_s(header: str | None, now: datetime) -> float:
    """The seconds that a `Retry-After` asks for (RFC 9110, 10.2.3: seconds or a date), 0 where it cannot be read."""
    text = (header or "").strip()
    if text.isascii() and text.isdigit():
        return float(text)
    try:
        date = parsedate_to_datetime(text)
    except (ValueError, OverflowError):  # the latter for a year that there is not
        return 0.0
    # One that names no zone is in UTC, as all dates of HTTP are.
    return max((date.replace(tzinfo=date.tzinfo or UTC) - now).total_seconds(), 0.0)


def _outcome_of(response: httpx.Response) -> _Outcome:
    status = response.status_code
    said = f"it answered {status}"
    if response.is_success:
        return _Outcome(True, said)
    if 300 <= status < 400:
        said += ", and redirects are not followed: name the URL that it leads to"
    elif status == httpx.codes.GONE:
        said += ", which asks for no more of them"
    asked = retry_after_s(response.headers.get("retry-after"), datetime.now(UTC))
    return _Outcome(False, said, again=status in _RETRIED, asked_s=asked)


def _parsed(url: str) -> httpx.URL:
    if len(url) > LONGEST_URL:
        raise ValueError(f"a webhook's URL has at most {LONGEST_URL} characters")
    if not url.isprintable() or " " in url:
        raise ValueError("a webhook's URL has no blanks, line breaks or control characters")
    try:
        parsed = httpx.URL(url)
        authority = urlsplit(url).netloc
    except (httpx.InvalidURL, ValueError):
        raise ValueError("the webhook is no URL that can be read") from None
    if parsed.scheme not in ("http", "https"):
        raise ValueError("a webhook's URL begins with https:// or http://")
    if not parsed.host:
        raise ValueError("a webhook's URL names a host, as https://example.com/hook does")
    if "@" in authority or parsed.userinfo:
        raise ValueError(
            "a webhook's URL must hold no user name or password: it is kept beside the prediction. Put a token into "
            "its query, or verify the signature"
        )
    if parsed.port is not None and not 0 < parsed.port < 65536:
        raise ValueError("the port of a webhook's URL is 1 to 65535")
    return parsed


def _check(what: str, check: Callable[[str], None], value: str) -> None:
    try:
        check(value)
    except ValueError as error:
        raise ValueError(f"{what} {error}") from None
