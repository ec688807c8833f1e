"""What a webhook may be: its URL, its events, the secret that signs it, and each message's id."""

from __future__ import annotations

import asyncio
import base64
import re
from collections.abc import Sequence

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.addresses import AddressRefused, Guard
from gateway.webhooks import (
    WebhookEvent,
    Webhooks,
    check_auth_token,
    check_reachable,
    check_secret,
    check_url,
    due,
    message_id,
)
from images.prediction import Webhook
from tests.gateway.receiving import LOOPBACK, Names

# One message, one id.

EVENTS = ("start", "output", "logs", "completed")
MESSAGES = st.tuples(
    st.one_of(st.text(), st.from_regex(r"[a-z0-9_.-]{0,70}", fullmatch=True)),
    st.sampled_from(EVENTS),
    st.integers(0, 1000),
    st.integers(0, 20),
)


@given(MESSAGES, MESSAGES)
def test_every_message_has_an_id_of_its_own_that_a_header_can_carry(
    one: tuple[str, WebhookEvent, int, int], other: tuple[str, WebhookEvent, int, int]
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
