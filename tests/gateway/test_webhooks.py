"""A caller hears of a prediction's end, can tell who says so, and costs nobody else anything.

Receivers are real servers on loopback, which an allowance makes reachable. They verify what arrives with the library
that receivers have for it.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import logging
import re
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import httpx
import pytest
import standardwebhooks
from hypothesis import given
from hypothesis import strategies as st

from gateway.addresses import AddressRefused, Guard, GuardedTransport, parse_allowed
from gateway.webhooks import (
    WebhookEvent,
    WebhookPatience,
    Webhooks,
    check_auth_token,
    check_reachable,
    check_secret,
    check_url,
    due,
    message_id,
    retry_after_s,
)
from images.prediction import Webhook
from tests.support.asgi import HOST, serving

NEVER_S = 3600.0
TIMEOUT_S = 20.0
QUICK = WebhookPatience(attempt_s=TIMEOUT_S, attempts=4, first_pause_s=0.01, longest_pause_s=0.05)
# Whoever pauses hangs, and the test with it.
ONCE = WebhookPatience(
    attempt_s=TIMEOUT_S, first_pause_s=NEVER_S, longest_pause_s=NEVER_S, give_up_after_s=NEVER_S * 9
)
SECRET = "whsec_" + base64.b64encode(bytes(range(32))).decode()
TOKEN = "token-of-the-operator"
ANSWER: dict[str, Any] = {
    "id": "a-fox.1",
    "status": "succeeded",
    "input": {"prompt": "ein Fuchs 🦊 im Schnee"},
    "output": ["https://images.example.test/a-fox.1-0.png?X-Amz-Signature=abc"],
    "metrics": {"seed": 7, "timings": {"denoise": 0.25}},
}

Answers = Sequence[tuple[int, Mapping[str, str]]]


@dataclass(frozen=True)
class Arrived:
    path: str
    headers: dict[str, str]
    body: bytes

    def verified(self) -> Any:
        return standardwebhooks.Webhook(SECRET).verify(self.body, self.headers)


@dataclass
class Receiver:
    """A server that keeps what it got and answers in turn, the last answer for ever; `gone` when a caller hangs up."""

    answers: Answers = ((200, {}),)
    arrived: list[Arrived] = field(default_factory=list)
    gone: threading.Event = field(default_factory=threading.Event)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        body = b""
        more = True
        while more:
            part = await receive()
            body += part.get("body", b"")
            more = part.get("more_body", False)
        headers = {name.decode(): value.decode("latin-1") for name, value in scope["headers"]}
        path = scope["path"] + "?" + scope["query_string"].decode()
        self.arrived.append(Arrived(path, headers, body))
        await self.answer(receive, send)

    async def answer(self, receive: Any, send: Any) -> None:
        status, given = self.answers[min(len(self.arrived), len(self.answers)) - 1]
        headers = [(name.encode(), value.encode()) for name, value in given.items()]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": b"what it says is nobody's business"})


class Silent(Receiver):
    """It takes the request and never answers."""

    async def answer(self, receive: Any, send: Any) -> None:
        await receive()
        self.gone.set()


class Endless(Receiver):
    """Its answer never ends."""

    async def answer(self, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        hung_up = asyncio.ensure_future(receive())
        while not hung_up.done():
            await send({"type": "http.response.body", "body": bytes(65536), "more_body": True})
            await asyncio.sleep(0)
        self.gone.set()


class Names:
    """A resolver that counts how often it is asked."""

    def __init__(self, address: str = HOST) -> None:
        self.address = address
        self.asked = 0

    async def __call__(self, host: str, port: int) -> Sequence[str]:
        self.asked += 1
        return [self.address]


LOOPBACK = Guard(parse_allowed("127.0.0.0/8"))


@asynccontextmanager
async def sender(
    patience: WebhookPatience = QUICK, *, guard: Guard = LOOPBACK, **options: Any
) -> AsyncIterator[Webhooks]:
    transport = GuardedTransport(guard)
    async with httpx.AsyncClient(transport=transport, trust_env=False) as client:
        yield Webhooks(client, patience=patience, **options)


def tell(
    url: str,
    event: WebhookEvent = "completed",
    *,
    patience: WebhookPatience = QUICK,
    answer: dict[str, Any] = ANSWER,
    number: int = 0,
    times: int = 1,
    **options: Any,
) -> list[bool]:
    """Send, as often as said; what was returned."""

    async def all_of_them() -> list[bool]:
        async with sender(patience, **options) as webhooks, asyncio.timeout(TIMEOUT_S):
            return [await webhooks.send(url, event, answer, number) for _ in range(times)]

    return asyncio.run(all_of_them())


@contextlib.contextmanager
def at(receiver: Receiver) -> Iterator[str]:
    with serving(receiver) as port:
        yield f"http://{HOST}:{port}/hook"


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(TIMEOUT_S):
        while not condition():  # noqa: ASYNC110 - a thread or a log sees to it
            await asyncio.sleep(0.01)


class Lines(logging.Handler):
    """What the module under test logs, tracebacks included."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)

    @property
    def messages(self) -> list[str]:
        return [logging.Formatter().format(record) for record in self.records]

    @property
    def text(self) -> str:
        return "\n".join(self.messages)


@pytest.fixture
def logged() -> Iterator[Lines]:
    lines = Lines()
    logger = logging.getLogger("gateway.webhooks")
    before = logger.level
    logger.addHandler(lines)
    logger.setLevel(logging.DEBUG)
    yield lines
    logger.removeHandler(lines)
    logger.setLevel(before)


# What arrives.


def test_a_receiver_can_verify_what_it_gets_and_reads_the_answer_in_it() -> None:
    receiver = Receiver()

    with at(receiver) as url:
        assert tell(f"{url}?room=7", signing_secret=SECRET) == [True]

    [arrived] = receiver.arrived
    assert arrived.verified() == ANSWER
    assert arrived.path == "/hook?room=7"
    assert arrived.headers["content-type"] == "application/json"
    assert arrived.headers["webhook-id"] == message_id("a-fox.1", "completed", 0)
    assert "authorization" not in arrived.headers


def test_what_was_changed_on_the_way_is_found_out() -> None:
    receiver = Receiver()

    with at(receiver) as url:
        tell(url, signing_secret=SECRET)

    [arrived] = receiver.arrived
    changed = [
        Arrived("", arrived.headers, arrived.body.replace(b"succeeded", b"failed")),
        Arrived("", arrived.headers | {"webhook-id": "another"}, arrived.body),
    ]
    for forged in changed:
        with pytest.raises(standardwebhooks.WebhookVerificationError):
            forged.verified()


@pytest.mark.parametrize("text", ["half a character: \ud83e", 'line\nend "quoted" \u2028', "\x00"])
def test_what_is_signed_is_what_is_sent_whatever_is_in_it(text: str) -> None:
    receiver = Receiver()
    answer = {"id": text, "input": {"prompt": text}}

    with at(receiver) as url:
        assert tell(url, answer=answer, signing_secret=SECRET) == [True]

    [arrived] = receiver.arrived
    assert arrived.verified() == answer


def test_without_a_secret_nothing_is_signed_and_the_rest_is_there() -> None:
    receiver = Receiver()

    with at(receiver) as url:
        assert tell(url) == [True]

    [arrived] = receiver.arrived
    assert "webhook-signature" not in arrived.headers
    assert arrived.headers["webhook-id"] == message_id("a-fox.1", "completed", 0)
    age = datetime.now(UTC).timestamp() - int(arrived.headers["webhook-timestamp"])
    assert 0 <= age < 300
    assert json.loads(arrived.body) == ANSWER


def test_the_operators_token_goes_into_the_authorization_header() -> None:
    receiver = Receiver()

    with at(receiver) as url:
        tell(url, auth_token=TOKEN)

    assert receiver.arrived[0].headers["authorization"] == f"Bearer {TOKEN}"


def test_a_cookie_is_not_kept() -> None:
    receiver = Receiver([(200, {"set-cookie": "who=you; Path=/"})])

    with at(receiver) as url:
        assert tell(url, times=2) == [True, True]

    assert [arrived.headers.get("cookie") for arrived in receiver.arrived] == [None, None]


# Trying again.


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504, 529])
def test_the_end_is_told_again_until_it_is_taken(status: int) -> None:
    receiver = Receiver([(status, {}), (status, {}), (204, {})])

    with at(receiver) as url:
        assert tell(url, signing_secret=SECRET) == [True]

    assert len(receiver.arrived) == 3
    assert {arrived.headers["webhook-id"] for arrived in receiver.arrived} == {
        message_id("a-fox.1", "completed", 0)
    }
    assert len({arrived.body for arrived in receiver.arrived}) == 1


def test_it_is_given_up_in_the_end(logged: Lines) -> None:
    receiver = Receiver([(500, {})])

    with at(receiver) as url:
        assert tell(url) == [False]

    assert len(receiver.arrived) == QUICK.attempts
    last = logged.records[-1]
    assert last.levelno == logging.WARNING
    assert "given up, after attempt 4 of 4: it answered 500" in last.getMessage()


def test_it_is_given_up_when_the_next_attempt_would_come_too_late() -> None:
    receiver = Receiver([(500, {})])
    patience = WebhookPatience(attempt_s=TIMEOUT_S, first_pause_s=60.0, give_up_after_s=1.0)

    with at(receiver) as url:
        assert tell(url, patience=patience) == [False]

    assert len(receiver.arrived) == 1


@pytest.mark.parametrize("event", ["start", "output", "logs"])
def test_what_is_not_the_end_is_told_once(event: WebhookEvent) -> None:
    receiver = Receiver([(500, {})])

    with at(receiver) as url:
        assert tell(url, event, patience=ONCE, number=3) == [False]

    [arrived] = receiver.arrived
    assert arrived.headers["webhook-id"] == message_id("a-fox.1", event, 3)


@pytest.mark.parametrize("status", [300, 400, 401, 403, 404, 409, 410, 422])
def test_a_refusal_is_taken_as_one(status: int, logged: Lines) -> None:
    receiver = Receiver([(status, {"retry-after": "0"})])

    with at(receiver) as url:
        assert tell(url, patience=ONCE) == [False]

    assert len(receiver.arrived) == 1
    assert f"it answered {status}" in logged.messages[-1]


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_not_followed_and_the_log_says_so(status: int, logged: Lines) -> None:
    receiver = Receiver([(status, {"location": "/elsewhere"}), (200, {})])

    with at(receiver) as url:
        assert tell(url, patience=ONCE) == [False]

    assert len(receiver.arrived) == 1
    assert "redirects are not followed" in logged.messages[-1]


@pytest.mark.parametrize("status", [429, 503])
def test_a_receiver_is_left_alone_for_as_long_as_it_asks_and_is_told_the_time_anew(
    status: int,
) -> None:
    receiver = Receiver([(status, {"retry-after": "1"}), (200, {})])
    patience = WebhookPatience(first_pause_s=0.01, longest_pause_s=5.0)

    with at(receiver) as url:
        assert tell(url, patience=patience, signing_secret=SECRET) == [True]

    first, second = receiver.arrived
    times = [int(arrived.headers["webhook-timestamp"]) for arrived in (first, second)]
    assert times[1] >= times[0] + 1
    assert first.verified() == second.verified() == ANSWER


@pytest.mark.parametrize("asked", ["86400", "9" * 400, "Wed, 01 Jan 2200 00:00:00 GMT"])
def test_a_receiver_cannot_ask_for_more_than_the_longest_pause(asked: str) -> None:
    receiver = Receiver([(429, {"retry-after": asked}), (200, {})])

    with at(receiver) as url:
        assert tell(url) == [True]

    assert len(receiver.arrived) == 2


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ("120", 120),
        (" 0 ", 0),
        ("Thu, 26 Nov 2026 12:00:30 GMT", 30),
        ("Thursday, 26-Nov-26 12:00:30 GMT", 30),
        ("Thu, 26 Nov 2026 12:00:30 -0000", 30),
        ("Thu, 26 Nov 2026 14:00:30 +0200", 30),
        ("Thu, 26 Nov 2026 11:00:00 GMT", 0),
        ("-5", 0),
        ("1.5", 0),
        ("³", 0),
        ("soon", 0),
        ("Thu, 99 Nov 2026 12:00:30 GMT", 0),
        ("", 0),
        (None, 0),
    ],
)
def test_retry_after_is_seconds_or_a_date(header: str | None, seconds: float) -> None:
    assert retry_after_s(header, datetime(2026, 11, 26, 12, tzinfo=UTC)) == seconds


@given(st.text())
def test_no_retry_after_is_more_than_can_be_read(header: str) -> None:
    assert retry_after_s(header, datetime(2026, 11, 26, 12, tzinfo=UTC)) >= 0


def test_pauses_grow_up_to_the_longest_and_are_minutes_in_all() -> None:
    patience = WebhookPatience()
    pauses = [patience.pause_s(failed, 0.0) for failed in range(1, patience.attempts)]

    assert 1.0 <= pauses[0] <= 1.25
    assert all(later / first >= 4 * 0.8 for first, later in zip(pauses, pauses[2:6], strict=False))
    assert max(pauses) <= patience.longest_pause_s * 1.25
    assert 5 * 60 <= sum(pauses) <= 10 * 60


# Receivers that are not there, and worse ones.


def test_a_host_that_refuses_connections_is_tried_again(unused_port: int, logged: Lines) -> None:
    names = Names()
    guard = Guard(parse_allowed(HOST), names)

    assert tell(f"http://hooks.example.test:{unused_port}/", guard=guard) == [False]

    assert names.asked == QUICK.attempts
    assert "given up, after attempt 4 of 4" in logged.messages[-1]


@pytest.fixture
def unused_port() -> int:
    with serving(Receiver()) as port:
        pass
    return port


def test_a_private_host_is_refused_at_once(logged: Lines) -> None:
    receiver = Receiver()

    with at(receiver) as url:
        assert tell(url, patience=ONCE, guard=Guard()) == [False]

    assert receiver.arrived == []
    [line] = logged.messages
    assert "is not a host on the internet" in line
    assert "ALLOW_PRIVATE_HOSTS" in line


def test_a_receiver_that_takes_too_long_is_hung_up_on_and_tried_again() -> None:
    receiver = Silent()
    patience = WebhookPatience(attempt_s=0.5, attempts=2, first_pause_s=0.01)

    with at(receiver) as url:
        assert tell(url, patience=patience) == [False]
        assert receiver.gone.wait(TIMEOUT_S)

    assert len(receiver.arrived) == 2


def test_a_receiver_that_answers_byte_by_byte_has_no_more_time_than_others(
    logged: Lines,
) -> None:
    async def drip(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        with contextlib.suppress(ConnectionError):
            writer.write(b"HTTP/1.1 200 OK\r\nx-slow: ")
            while True:
                writer.write(b".")
                await writer.drain()
                await asyncio.sleep(0.02)

    assert on_a_raw_server(drip, WebhookPatience(attempt_s=0.5, attempts=1)) is False
    assert "no answer within 0.5 s" in logged.messages[-1]


@pytest.mark.parametrize("said", [b"", b"\x16\x03\x01 not HTTP\r\n\r\n", b"HTTP/1.1 200 OK\r\nx: "])
def test_an_answer_that_is_not_http_is_tried_again_and_not_quoted(
    said: bytes, logged: Lines
) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked = await reader.readuntil(b"\r\n\r\n")
        writer.write(said and said.replace(b"\r\n\r\n", asked))
        writer.close()

    assert on_a_raw_server(answer, QUICK) is False
    assert "given up, after attempt 4 of 4: the connection broke" in logged.messages[-1]
    assert TOKEN not in logged.text


def on_a_raw_server(
    handle: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Coroutine[Any, Any, None]],
    patience: WebhookPatience,
) -> bool:
    handling: set[asyncio.Task[None]] = set()

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        handling.add(asyncio.ensure_future(handle(reader, writer)))

    async def told() -> bool:
        server = await asyncio.start_server(accept, HOST, 0)
        port = server.sockets[0].getsockname()[1]
        async with server, sender(patience, auth_token=TOKEN) as webhooks:
            delivered = await webhooks.send(f"http://{HOST}:{port}/", "completed", ANSWER)
            async with asyncio.timeout(TIMEOUT_S):
                await asyncio.gather(*handling)
        return delivered

    return asyncio.run(told())


def test_an_answer_without_end_is_not_read() -> None:
    receiver = Endless()

    with at(receiver) as url:
        assert tell(url, patience=ONCE) == [True]
        assert receiver.gone.wait(TIMEOUT_S)


@pytest.mark.parametrize(
    "url", ["file:///etc/passwd", "http://me:hidden@127.0.0.1/", "http://[::1/", "no URL"]
)
def test_a_url_that_was_never_checked_is_refused_without_an_exception(
    url: str, logged: Lines
) -> None:
    assert tell(url, patience=ONCE) == [False]
    assert "cannot be sent" in logged.messages[-1]
    assert "hidden" not in logged.text


def test_what_is_no_json_is_refused_without_an_exception() -> None:
    receiver = Receiver()

    with at(receiver) as url:
        assert tell(url, answer={"id": "x", "metrics": {"seed": float("nan")}}) == [False]

    assert receiver.arrived == []


def test_a_client_that_is_closed_is_logged_and_raises_nothing(
    logged: Lines,
) -> None:
    async def too_late() -> bool:
        async with sender() as webhooks:
            pass
        return await webhooks.send("http://127.0.0.1:1/", "completed", ANSWER)

    assert asyncio.run(too_late()) is False
    assert "fault of this program" in logged.text


# Ending it.


def test_a_cancelled_attempt_hangs_up_and_is_not_made_again() -> None:
    receiver = Silent()

    async def cancelled(url: str) -> None:
        async with sender(ONCE) as webhooks:
            sending = asyncio.create_task(webhooks.send(url, "completed", ANSWER))
            await until(lambda: receiver.arrived)
            sending.cancel()
            with pytest.raises(asyncio.CancelledError):
                await sending

    with at(receiver) as url:
        asyncio.run(cancelled(url))
        assert receiver.gone.wait(TIMEOUT_S)

    assert len(receiver.arrived) == 1


def test_a_pause_can_be_cancelled(logged: Lines) -> None:
    receiver = Receiver([(500, {})])

    async def cancelled(url: str) -> None:
        async with sender(ONCE) as webhooks:
            sending = asyncio.create_task(webhooks.send(url, "completed", ANSWER))
            await until(lambda: "follows in" in logged.text)
            sending.cancel()
            with pytest.raises(asyncio.CancelledError):
                await sending

    with at(receiver) as url:
        asyncio.run(cancelled(url))

    assert len(receiver.arrived) == 1


# What logs and messages keep to themselves.


@pytest.mark.parametrize("status", [200, 307, 404, 429])
def test_no_line_holds_what_could_open_anything(status: int, logged: Lines) -> None:
    receiver = Receiver([(status, {})])

    with at(receiver) as url:
        tell(
            f"{url}/T0/hidden-in-path?key=hidden-in-query#hidden-in-fragment",
            signing_secret=SECRET,
            auth_token=TOKEN,
        )

    assert logged.messages
    for secret in ("hidden", "key=", SECRET.removeprefix("whsec_"), TOKEN, "X-Amz"):
        assert secret not in logged.text
    assert f"webhook {message_id('a-fox.1', 'completed', 0)} to http://{HOST}:" in logged.text


# One message, one id.

EVENTS = ("start", "output", "logs", "completed")
MESSAGES = st.tuples(
    st.one_of(st.text(), st.from_regex(r"[a-z0-9_.-]{0,70}", fullmatch=True)),
    st.sampled_from(EVENTS),
    st.integers(0, 1000),
)


@given(MESSAGES, MESSAGES)
def test_every_message_has_an_id_of_its_own_that_a_header_can_carry(
    one: tuple[str, WebhookEvent, int], other: tuple[str, WebhookEvent, int]
) -> None:
    assert re.fullmatch(r"[A-Za-z0-9_-]{1,100}", message_id(*one))
    assert (message_id(*one) == message_id(*other)) == (one == other)


@pytest.mark.parametrize("odd", ["", "a.b", "ключ", "a\r\nx: y", "\ud800", "x" * 65])
def test_an_odd_id_is_told_apart_from_others_all_the_same(odd: str) -> None:
    assert re.fullmatch(r"sha256-[0-9a-f]{64}-completed-0", message_id(odd, "completed", 0))


def test_a_plain_id_can_be_read() -> None:
    assert message_id("0b5c_7-A", "output", 2) == "0b5c_7-A-output-2"


# What can be a webhook.


@pytest.mark.parametrize(
    "url",
    [
        "https://example.com",
        "HTTPS://Example.com:8443/hook?token=a@b",
        "http://[2606:4700::1111]:80/",
        "https://bücher.example/höök",
    ],
)
def test_a_url_that_can_be_a_webhook_is_let_through(url: str) -> None:
    check_url(url)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("ftp://hidden.example/", "begins with https"),
        ("//hidden.example/", "begins with https"),
        ("hidden", "begins with https"),
        ("", "begins with https"),
        ("file:///hidden", "begins with https"),
        ("http:///hidden", "names a host"),
        ("https://:443/hidden", "names a host"),
        ("https://hidden:pass@example.com/", "user name or password"),
        ("https://hidden@example.com/", "user name or password"),
        ("https://@example.com/hidden", "user name or password"),
        ("https://example.com\\@hidden.example/", "user name or password"),
        ("https://example.com:0/hidden", "port"),
        ("https://example.com:65536/hidden", "port"),
        ("https://example.com:hidden/", "no URL"),
        ("https://[::1/hidden", "no URL"),
        ("https://example.com/a hidden", "no blanks"),
        ("https://example.com/\r\nhidden: 1", "no blanks"),
        ("https://example.com/\x00hidden", "no blanks"),
        ("https://example.com/" + "hidden" * 1000, "at most 4096"),
    ],
)
def test_a_url_that_cannot_be_a_webhook_is_refused_and_not_repeated(url: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        check_url(url)

    assert "hidden" not in str(caught.value)


@pytest.mark.parametrize("url", ["http://169.254.169.254/latest/", "https://[::1]/", "http://0/"])
def test_a_host_behind_our_own_door_is_refused_before_anything_is_made(url: str) -> None:
    with pytest.raises(AddressRefused):
        asyncio.run(check_reachable(Guard(), url))


def test_a_host_that_may_be_reached_or_cannot_be_found_now_is_let_through() -> None:
    async def nobody(host: str, port: int) -> Sequence[str]:
        raise OSError("no such host")

    asyncio.run(check_reachable(Guard(resolve=Names("93.184.216.34")), "https://example.com/"))
    asyncio.run(check_reachable(LOOPBACK, "http://127.0.0.1/"))
    asyncio.run(check_reachable(Guard(resolve=nobody), "https://example.com/"))


@pytest.mark.parametrize(
    ("events_filter", "heard"),
    [(None, EVENTS), ((), ()), (("completed",), ("completed",)), (("logs", "x"), ("logs",))],
)
def test_a_filter_says_what_is_due(
    events_filter: tuple[str, ...] | None, heard: tuple[str, ...]
) -> None:
    webhook = Webhook(url="https://example.com/", events_filter=events_filter)

    assert tuple(event for event in EVENTS if due(webhook, event)) == heard


# The settings.


@pytest.mark.parametrize("size", [24, 25, 26, 32, 64])
def test_a_secret_of_a_good_size_is_taken(size: int) -> None:
    check_secret("whsec_" + base64.b64encode(b"k" * size).decode())


def test_a_secret_may_begin_or_hold_any_letter_of_base64() -> None:
    check_secret("whsec_" + base64.b64encode(b"\xfb\xff" * 16).decode())


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("", "must be whsec_"),
        ("aGlkZGVu" * 5, "must be whsec_"),
        ("WHSEC_" + "aGlkZGVu" * 5, "must be whsec_"),
        ("whsec_", "24 to 64 bytes .* holds 0"),
        ("whsec_" + "aGlkZGVu" * 3, "24 to 64 bytes .* holds 18"),
        ("whsec_" + "aGlkZGVu" * 11, "24 to 64 bytes .* holds 66"),
        ("whsec_" + "aGlkZGVu" * 5 + "aGk", "base64"),
        ("whsec_" + "aGlkZGVu" * 5 + "-_-_", "base64"),
        ("whsec_" + "aGlkZGVu" * 5 + "\n", "base64"),
        ("whsec_" + "aGlkZGVu" * 5 + "ключ", "base64"),
    ],
)
def test_another_secret_is_refused_and_not_repeated(value: str, message: str) -> None:
    for check in (
        check_secret,
        lambda secret: Webhooks(httpx.AsyncClient(), signing_secret=secret),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            check(value)
        assert "aGlkZGVu" not in str(caught.value)


@pytest.mark.parametrize("value", ["", "hidden token", "hidden\n", "hidden-ключ", "hidden\r\nx: y"])
def test_a_token_that_no_header_can_carry_is_refused_and_not_repeated(value: str) -> None:
    for check in (check_auth_token, lambda token: Webhooks(httpx.AsyncClient(), auth_token=token)):
        with pytest.raises(ValueError, match="printable") as caught:
            check(value)
        assert "hidden" not in str(caught.value)
