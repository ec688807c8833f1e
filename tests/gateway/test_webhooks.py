"""A caller hears of a prediction's end, can tell who says so, and costs nobody else anything.

Receivers are real servers on loopback, which an allowance makes reachable. They verify what arrives with the library
that receivers have for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import Callable, Coroutine, Iterator
from datetime import UTC, datetime
from typing import Any

import pytest
import standardwebhooks
from hypothesis import given
from hypothesis import strategies as st

from gateway.addresses import Guard, parse_allowed
from gateway.webhooks import (
    WebhookEvent,
    WebhookPatience,
    message_id,
    retry_after_s,
)
from tests.gateway.receiving import (
    ANSWER,
    ONCE,
    QUICK,
    SECRET,
    TIMEOUT_S,
    TOKEN,
    Arrived,
    Endless,
    Lines,
    Names,
    Receiver,
    Silent,
    at,
    sender,
    tell,
    until,
)
from tests.support.asgi import HOST, serving


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
        ("Thu, 26 Nov 99999999999999999999 12:00:30 GMT", 0),
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
    async def too_late() -> bool | None:
        async with sender() as webhooks:
            pass
        return await webhooks.send("http://127.0.0.1:1/", "completed", ANSWER)

    assert asyncio.run(too_late()) is None
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
