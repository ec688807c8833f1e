"""Whatever a stranger's URL says, nothing is connected to but the internet and what was allowed.

Real servers on loopback stand for what must not be reached, and by an allowance for what may. Names come from a
resolver of the test, which may change its mind.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import ssl
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request
from fastapi.responses import RedirectResponse, StreamingResponse

from gateway.addresses import (
    SETTING,
    AddressRefused,
    Allowed,
    Guard,
    GuardedTransport,
    destination,
    is_on_the_internet,
    parse_allowed,
)
from tests.support.asgi import HOST, serving
from tests.support.authority import Authority

LOOPBACK = parse_allowed("127.0.0.0/8,::1")
NAME = "hooks.example.test"
PUBLIC = "93.184.216.34"


class Names:
    """A resolver: one answer after the other for any name, the last for ever."""

    def __init__(self, *answers: Sequence[str]) -> None:
        self._answers = list(answers)
        self.asked: list[str] = []

    async def __call__(self, host: str, port: int) -> Sequence[str]:
        self.asked.append(host)
        return self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]


class Receiver:
    """A server that keeps what it was asked."""

    def __init__(self) -> None:
        self.requests: list[dict[str, str]] = []
        self.app = FastAPI()
        self.app.post("/hook")(self.hook)
        self.app.get("/elsewhere")(self.elsewhere)
        self.app.get("/stream")(self.stream)

    async def hook(self, request: Request) -> str:
        self.requests.append(dict(request.headers) | {"body": (await request.body()).decode()})
        return "thanks"

    async def elsewhere(self, to: str) -> RedirectResponse:
        return RedirectResponse(to)

    async def stream(self) -> StreamingResponse:
        return StreamingResponse(iter([b"one ", b"two ", b"three"]))


@pytest.fixture
def receiver() -> Receiver:
    return Receiver()


@pytest.fixture
def port(receiver: Receiver) -> Iterator[int]:
    with serving(receiver.app) as port:
        yield port


def ask(
    guard: Guard, method: str, *urls: str, verify: ssl.SSLContext | bool = True, **options: Any
) -> list[httpx.Response]:
    """Requests one after the other, by one client."""

    async def all_of_them() -> list[httpx.Response]:
        transport = GuardedTransport(guard, verify=verify)
        async with httpx.AsyncClient(transport=transport, timeout=30) as client:
            return [await client.request(method, url, **options) for url in urls]

    return asyncio.run(all_of_them())


# Judging.


@pytest.mark.parametrize(
    "address",
    [
        "0.0.0.0",  # noqa: S104
        "0.1.2.3",
        "10.1.2.3",
        "100.64.0.1",
        "127.0.0.1",
        "127.255.255.254",
        "169.254.169.254",
        "172.16.0.1",
        "172.31.255.255",
        "192.0.2.1",
        "192.168.1.1",
        "198.18.0.1",
        "224.0.0.1",
        "239.255.255.255",
        "240.0.0.1",
        "255.255.255.255",
        "::",
        "::1",
        "::127.0.0.1",
        "::8.8.8.8",
        "::ffff:127.0.0.1",
        "::ffff:169.254.169.254",
        "::ffff:0:127.0.0.1",
        "2002:7f00:1::",
        "2002:a9fe:a9fe::1",
        "2002:0a00:0001::",
        "64:ff9b::127.0.0.1",
        "64:ff9b::a9fe:a9fe",
        "64:ff9b:1::8.8.8.8",
        "2001:0:4136:e378:8000:63bf:3fff:fdd2",
        "2001:db8::1",
        "3fff::1",
        "100::1",
        "5f00::1",
        "fc00::1",
        "fd00:ec2::254",
        "fe80::1",
        "fe80::1%lo",
        "fec0::1",
        "ff02::1",
        "ff0e::1",
    ],
)
def test_an_address_that_is_not_the_internets_is_refused(address: str) -> None:
    with pytest.raises(AddressRefused) as caught:
        asyncio.run(Guard(resolve=Names([address])).addresses(NAME, 443))

    assert caught.value.host == NAME
    assert ipaddress.ip_address(caught.value.address) == ipaddress.ip_address(address)


@pytest.mark.parametrize(
    "address",
    [PUBLIC, "8.8.8.8", "172.32.0.1", "2606:4700::1111", "64:ff9b::8.8.8.8", "::ffff:8.8.8.8"],
)
def test_an_address_of_the_internet_is_let_through_as_it_is(address: str) -> None:
    found = asyncio.run(Guard(resolve=Names([address])).addresses(NAME, 443))

    assert [ipaddress.ip_address(text) for text in found] == [ipaddress.ip_address(address)]


def test_one_private_address_among_public_ones_refuses_the_host() -> None:
    with pytest.raises(AddressRefused):
        asyncio.run(Guard(resolve=Names([PUBLIC, "10.0.0.1", PUBLIC])).addresses(NAME, 443))


@pytest.mark.parametrize("wrapped", ["::ffff:10.0.0.9", "64:ff9b::10.0.0.9", "2002:a00:9::"])
def test_an_address_inside_another_is_what_counts(wrapped: str) -> None:
    address = destination(ipaddress.ip_address(wrapped))

    assert address == ipaddress.ip_address("10.0.0.9")
    assert not is_on_the_internet(address)


@pytest.mark.parametrize(
    "address", ["10.0.0.9", "::ffff:10.0.0.9", "64:ff9b::10.0.0.9", "fd00::1", "192.168.7.7"]
)
def test_an_allowed_network_or_address_is_let_through(address: str) -> None:
    guard = Guard(parse_allowed("10.0.0.0/8, fd00::/8,192.168.7.7"), Names([address]))

    assert asyncio.run(guard.addresses(NAME, 443))


@pytest.mark.parametrize("host", ["Hooks.internal", "hooks.internal", "hooks.internal."])
def test_an_allowed_host_may_be_anywhere_however_it_is_written(host: str) -> None:
    guard = Guard(parse_allowed("hooks.internal"), Names(["10.0.0.9"]))

    assert asyncio.run(guard.addresses(host, 443)) == ["10.0.0.9"]


@pytest.mark.parametrize(
    "host", ["a.hooks.internal", "hooks.internal.example.test", "ooks.internal"]
)
def test_an_allowed_host_allows_no_other(host: str) -> None:
    guard = Guard(parse_allowed("hooks.internal"), Names(["10.0.0.9"]))

    with pytest.raises(AddressRefused):
        asyncio.run(guard.addresses(host, 443))


# The setting.


def test_the_setting_holds_hosts_addresses_and_networks() -> None:
    allowed = parse_allowed(" Hooks.Internal,10.0.0.0/8 , ::1,[fd00::1],192.168.0.1,receiver")

    assert allowed.hosts == {"hooks.internal", "receiver"}
    assert [str(network) for network in allowed.networks] == [
        "10.0.0.0/8",
        "::1/128",
        "fd00::1/128",
        "192.168.0.1/32",
    ]


def test_an_empty_setting_allows_nothing() -> None:
    assert parse_allowed(" ") == Allowed()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("http://hooks.internal", "network that is none"),
        ("hooks.internal:8080", "without scheme or port"),
        ("hooks.internal,", "must be host names"),
        ("*.internal", "must be host names"),
        ("10.0.0.1/8", "network that is none.*host bits"),
        ("10.0.0.0/33", "network that is none"),
        ("127.1", "must be host names"),
        ("2130706433", "must be host names"),
        ("0x7f.1", "must be host names"),
        ("a b", "must be host names"),
    ],
)
def test_a_setting_that_cannot_be_read_is_refused(value: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_allowed(value)


# Connecting.


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "localhost",
        "LOCALHOST",
        "127.1",
        "2130706433",
        "0x7f000001",
        "0x7f.0.0.1",
        "0177.0.0.1",
        "0",
        "0.0.0.0",  # noqa: S104
        "[::1]",
        "[::]",
        "[::ffff:127.0.0.1]",
        "[::ffff:7f00:1]",
        "①②⑦.0.0.1",
        "127。0。0。1",
    ],
)
def test_a_server_on_loopback_is_not_reached_however_its_address_is_spelled(
    receiver: Receiver, port: int, host: str
) -> None:
    with pytest.raises((AddressRefused, httpx.InvalidURL)):
        ask(Guard(), "POST", f"http://{host}:{port}/hook")

    assert receiver.requests == []


def test_what_is_refused_names_the_host_and_the_setting_and_keeps_the_rest_to_itself() -> None:
    with pytest.raises(AddressRefused) as caught:
        ask(Guard(resolve=Names(["10.7.7.7"])), "GET", f"http://me:secret@{NAME}/hook?token=secret")

    message = str(caught.value)
    assert message.startswith(f"{NAME} is not a host on the internet")
    assert SETTING in message
    assert "secret" not in message
    assert "10.7.7.7" not in message
    assert isinstance(caught.value, httpx.HTTPError)
    assert caught.value.request.url.host == NAME


def test_a_name_that_changes_its_mind_is_connected_to_where_it_was_judged(
    receiver: Receiver, port: int
) -> None:
    """Nothing listens at the first answer, which was allowed; the second is the server, and never asked for."""
    names = Names(["::1"], [HOST])
    guard = Guard(parse_allowed("::1"), names)

    with pytest.raises(httpx.ConnectError):
        ask(guard, "POST", f"http://{NAME}:{port}/hook")

    assert names.asked == [NAME]
    assert receiver.requests == []


def test_a_name_that_turns_private_is_refused_at_the_next_connection(
    receiver: Receiver, port: int
) -> None:
    guard = Guard(LOOPBACK, Names([HOST], ["169.254.169.254"]))
    url = f"http://{NAME}:{port}/hook"

    with pytest.raises(AddressRefused):
        ask(guard, "POST", url, url, headers={"Connection": "close"})

    assert len(receiver.requests) == 1


def test_a_kept_connection_stays_where_it_was_judged(receiver: Receiver, port: int) -> None:
    names = Names([HOST], ["169.254.169.254"])
    url = f"http://{NAME}:{port}/hook"

    answers = ask(Guard(LOOPBACK, names), "POST", url, url)

    assert [answer.json() for answer in answers] == ["thanks", "thanks"]
    assert names.asked == [NAME]


def test_the_host_header_is_the_urls(receiver: Receiver, port: int) -> None:
    url = f"http://me:secret@{NAME}:{port}/hook"

    ask(Guard(LOOPBACK, Names([HOST])), "POST", url, content=b"done")

    [request] = receiver.requests
    assert request["host"] == f"{NAME}:{port}"
    assert request["body"] == "done"
    assert request["authorization"].startswith("Basic ")


def test_tls_asks_for_the_urls_name_and_checks_it(receiver: Receiver, tmp_path: Path) -> None:
    authority = Authority(tmp_path / "authority")
    asked_for: list[str | None] = []
    tls = authority.context(NAME)
    tls.sni_callback = lambda _connection, name, _context: asked_for.append(name)
    trusting = ssl.create_default_context(cafile=str(authority.bundle))
    guard = Guard(LOOPBACK, Names([HOST]))

    with serving(receiver.app, tls=tls) as port:
        [answer] = ask(guard, "POST", f"https://{NAME}:{port}/hook", verify=trusting)
        with pytest.raises(httpx.ConnectError, match=r"other\.example\.test"):
            ask(guard, "POST", f"https://other.example.test:{port}/hook", verify=trusting)

    assert answer.json() == "thanks"
    assert asked_for == [NAME, "other.example.test"]
    assert [request["host"] for request in receiver.requests] == [f"{NAME}:{port}"]


def test_a_redirect_is_answered_and_not_followed(port: int) -> None:
    url = f"http://{NAME}:{port}/elsewhere?to=http://10.0.0.1/"

    [answer] = ask(Guard(LOOPBACK, Names([HOST])), "GET", url)

    assert (answer.status_code, answer.headers["location"]) == (307, "http://10.0.0.1/")


def test_a_client_that_follows_redirects_is_stopped_at_the_wall(port: int) -> None:
    url = f"http://{HOST}:{port}/elsewhere?to=http://169.254.169.254/latest/meta-data/"

    with pytest.raises(AddressRefused, match=r"169\.254\.169\.254"):
        ask(Guard(LOOPBACK), "GET", url, follow_redirects=True)


@pytest.mark.parametrize("url", ["ws://{}/", "ftp://{}/", "file:///etc/passwd", "gopher://{}/"])
def test_only_http_and_https_are_spoken(url: str) -> None:
    names = Names([HOST])

    with pytest.raises(httpx.UnsupportedProtocol):
        ask(Guard(LOOPBACK, names), "GET", url.format(NAME))

    assert names.asked == []


def test_an_address_where_nobody_listens_is_passed_over(receiver: Receiver, port: int) -> None:
    guard = Guard(LOOPBACK, Names(["::1", HOST]))

    [answer] = ask(guard, "POST", f"http://{NAME}:{port}/hook")

    assert answer.json() == "thanks"


def test_a_streamed_answer_arrives(port: int) -> None:
    [answer] = ask(Guard(LOOPBACK, Names([HOST])), "GET", f"http://{NAME}:{port}/stream")

    assert answer.text == "one two three"


def test_a_proxy_of_the_environment_is_not_used(
    receiver: Receiver, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would resolve the name for us, and could reach what we must not."""
    monkeypatch.setenv("HTTP_PROXY", f"http://{HOST}:{port}")
    monkeypatch.setenv("ALL_PROXY", f"http://{HOST}:{port}")

    with pytest.raises(AddressRefused):
        ask(Guard(resolve=Names(["10.0.0.1"])), "POST", f"http://{NAME}/hook")

    assert receiver.requests == []


def test_a_name_that_nobody_has_is_a_failed_connection() -> None:
    async def nowhere(host: str, port: int) -> Sequence[str]:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    with pytest.raises(httpx.ConnectError, match=f"the name {NAME} was not resolved"):
        ask(Guard(resolve=nowhere), "GET", f"http://{NAME}/")


@pytest.mark.parametrize("name", ["a" * 64 + ".test", "a..test"])
def test_what_cannot_be_a_name_is_a_failed_connection(name: str) -> None:
    with pytest.raises(httpx.ConnectError, match="was not resolved"):
        ask(Guard(), "GET", f"http://{name}/")


def test_a_name_without_addresses_is_a_failed_connection() -> None:
    with pytest.raises(httpx.ConnectError, match=f"the name {NAME} was not resolved"):
        ask(Guard(resolve=Names([])), "GET", f"http://{NAME}/")


def test_a_resolver_that_does_not_answer_is_a_connection_that_took_too_long() -> None:
    async def silent(host: str, port: int) -> Sequence[str]:
        await asyncio.Event().wait()
        return []

    with pytest.raises(httpx.ConnectTimeout, match=f"the name {NAME} was not resolved in time"):
        ask(Guard(resolve=silent), "GET", f"http://{NAME}/", timeout=0.1)


def test_errors_of_the_connection_are_httpxs_own() -> None:
    with socket.create_server((HOST, 0)) as listener:

        def accept_and_close() -> None:
            listener.accept()[0].close()

        hang_up = threading.Thread(target=accept_and_close)
        hang_up.start()
        with pytest.raises((httpx.RemoteProtocolError, httpx.ReadError)):
            ask(Guard(LOOPBACK), "GET", f"http://{HOST}:{listener.getsockname()[1]}/")
        hang_up.join()
