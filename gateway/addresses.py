"""Requests to places that strangers name, webhooks above all, reach the internet and nothing behind our own door.

A host is resolved here, every address it has is judged, and the connection goes to an address that was judged: there
is no second look-up in which a name could turn into another place (DNS rebinding).
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import re
import socket
import ssl
import threading
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import httpcore
import httpx

SETTING = "ALLOW_PRIVATE_HOSTS"
Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network
# From a host and a port to addresses, as text. Raises OSError where there are none.
Resolve = Callable[[str, int], Awaitable[Sequence[str]]]

# Each is a thread that sleeps, for as long as the system's resolver has patience: often ten seconds and more.
MOST_LOOKUPS = 32

# All that IANA has given out for the internet. What else is "global" to a Python may be anything.
IPV6_INTERNET = ipaddress.IPv6Network("2000::/3")
# Documentation since RFC 9637, later than some Pythons' lists.
IPV6_DOCUMENTATION = ipaddress.IPv6Network("3fff::/20")
# The last 32 bits are an IPv4 address: where there is only IPv6, DNS gives these out (RFC 6052).
NAT64 = ipaddress.IPv6Network("64:ff9b::/96")


class AddressRefused(httpx.TransportError):
    """A host is not on the internet and was not allowed. The message is fit for whoever named it: no address in it."""

    def __init__(self, host: str, address: str) -> None:
        super().__init__(
            f"{host} is not a host on the internet: it has an address that is private, local or reserved. "
            f"If it is meant to be reached, whoever runs this server can add it to {SETTING}."
        )
        self.host = host
        self.address = address


@dataclass(frozen=True)
class Allowed:
    """What may be reached although it is not on the internet: hosts by their names, and networks."""

    hosts: frozenset[str] = frozenset()
    networks: tuple[Network, ...] = ()

    def permits(self, address: Address) -> bool:
        return any(address in network for network in self.networks)


def parse_allowed(value: str) -> Allowed:
    """Read `ALLOW_PRIVATE_HOSTS`: host names, addresses and networks (10.0.0.0/8), with commas between them.

    Raises ValueError with a message that continues the variable's name.
    """
    hosts: set[str] = set()
    networks: list[Network] = []
    if not value.strip():
        return Allowed()
    for part in value.split(","):
        part = part.strip().lower()
        try:
            networks.append(ipaddress.ip_network(part.strip("[]")))
            continue
        except ValueError as error:
            if "/" in part:
                raise ValueError(f"holds a network that is none, {part!r}: {error}") from None
        # Digits and dots alone would be an address in one of the spellings that resolvers take: 127.1, 2130706433.
        if re.fullmatch(r"[0-9.]+|0x.*", part) or not re.fullmatch(
            r"[a-z0-9_]([a-z0-9._-]*[a-z0-9])?", part
        ):
            raise ValueError(
                "must be host names, addresses or networks with commas between them, without scheme or port, such as "
                f"hooks.internal,10.0.0.0/8: {part!r} is none"
            )
        hosts.add(part)
    return Allowed(frozenset(hosts), tuple(networks))


def destination(address: Address) -> Address:
    """Where packets to an address end: the IPv4 address inside an IPv6 one of the kinds that carry one."""
    if isinstance(address, ipaddress.IPv6Address):
        if address in NAT64:
            return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        return address.ipv4_mapped or address.sixtofour or address
    return address


def is_on_the_internet(address: Address) -> bool:
    """Whether an address is one of the internet's, that one host has. Give it what `destination` returned."""
    if isinstance(address, ipaddress.IPv6Address) and (
        address not in IPV6_INTERNET or address in IPV6_DOCUMENTATION
    ):
        return False
    return address.is_global and not address.is_multicast and not address.is_reserved


class _Lookups:
    """Looks names up, at most `MOST_LOOKUPS` at once, each on a thread that nobody has to wait for.

    The event loop's own threads, four with uvloop, are for the names that we ask for ourselves, the bucket's above
    all: names that strangers choose may answer late on purpose. An executor's threads would hold up this process's end.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: deque[tuple[Future[list[str]], str, int]] = deque()
        self._threads = 0

    def ask(self, host: str, port: int) -> Future[list[str]]:
        """One that is cancelled before its turn is not looked up. Nothing stops one that has begun."""
        answer: Future[list[str]] = Future()
        with self._lock:
            self._waiting.append((answer, host, port))
            if self._threads < MOST_LOOKUPS:
                threading.Thread(target=self._work, name="lookup", daemon=True).start()
                self._threads += 1
        return answer

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._waiting:
                    self._threads -= 1
                    return
                answer, host, port = self._waiting.popleft()
            if not answer.set_running_or_notify_cancel():
                continue
            try:
                found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            except Exception as error:  # noqa: BLE001 - whoever asked gets it, whatever it is
                answer.set_exception(error)
            else:
                answer.set_result(list(dict.fromkeys(str(address[0]) for *_, address in found)))


_lookups = _Lookups()


async def resolve_as_the_system_does(host: str, port: int) -> Sequence[str]:
    """With getaddrinfo, which also takes 127.1, 0x7f000001 and the like: what they mean is judged, not their looks.

    How long is waited is the caller's affair, the wait for a turn among many included.
    """
    try:
        return await asyncio.wrap_future(_lookups.ask(host, port))
    except UnicodeError as error:  # a label that is empty, or longer than 63 bytes
        raise socket.gaierror(socket.EAI_NONAME, "not a name that a host can have") from error


@dataclass(frozen=True)
class Guard:
    """Judges hosts."""

    allowed: Allowed = Allowed()
    resolve: Resolve = resolve_as_the_system_does

    async def addresses(self, host: str, port: int) -> list[str]:
        """The addresses of a host, all of them allowed.

        Raises AddressRefused where one is not, even if others are: an honest name does not point at both sides of a
        wall. Raises OSError where the host has none.
        """
        name = host.lower().rstrip(".")
        found = [ipaddress.ip_address(text) for text in await self.resolve(host, port)]
        if not found:
            raise socket.gaierror(socket.EAI_NONAME, "no address")
        for address in found:
            reached = destination(address)
            if not (
                name in self.allowed.hosts
                or self.allowed.permits(reached)
                or is_on_the_internet(reached)
            ):
                raise AddressRefused(host, str(address))
        return [str(address) for address in found]


class GuardedTransport(httpx.AsyncBaseTransport):
    """httpx's transport for URLs that strangers give: `httpx.AsyncClient(transport=GuardedTransport())`.

    Host header, TLS server name and certificate check stay those of the URL. It follows no redirect itself, and where
    the client does, each step is judged like the first. With it, httpx uses no proxy of the environment: a proxy would
    resolve the name again, on the other side of the wall.
    """

    def __init__(
        self,
        guard: Guard | None = None,
        *,
        verify: ssl.SSLContext | bool = True,
        most_connections: int = 100,
    ) -> None:
        self._pool = httpcore.AsyncConnectionPool(
            ssl_context=httpx.create_ssl_context(verify=verify),
            max_connections=most_connections,
            max_keepalive_connections=20,
            keepalive_expiry=5.0,
            network_backend=_GuardedBackend(guard or Guard()),
        )

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        url = request.url
        if url.scheme not in ("http", "https"):
            raise httpx.UnsupportedProtocol(
                f"only http and https are spoken, not {url.scheme}", request=request
            )
        with _errors_of_httpx():
            response = await self._pool.handle_async_request(
                httpcore.Request(
                    method=request.method,
                    url=httpcore.URL(
                        scheme=url.raw_scheme,
                        host=url.raw_host,
                        port=url.port,
                        target=url.raw_path,
                    ),
                    headers=request.headers.raw,
                    content=request.stream,
                    extensions=request.extensions,
                )
            )
        return httpx.Response(
            status_code=response.status,
            headers=response.headers,
            stream=_Body(response),
            extensions=response.extensions,
        )

    async def aclose(self) -> None:
        await self._pool.aclose()


class _GuardedBackend(httpcore.AsyncNetworkBackend):
    """Where httpcore's pool opens its connections."""

    def __init__(self, guard: Guard) -> None:
        self._guard = guard
        self._plain = httpcore.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ASYNC109 - httpcore's signature
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        loop = asyncio.get_running_loop()
        ends = None if timeout is None else loop.time() + timeout
        try:
            async with asyncio.timeout_at(ends):
                addresses = await self._guard.addresses(host, port)
        except TimeoutError as error:
            raise httpcore.ConnectTimeout(f"the name {host} was not resolved in time") from error
        except OSError as error:
            raise httpcore.ConnectError(f"the name {host} was not resolved: {error}") from error
        for position, address in enumerate(addresses):
            # What time is left is shared out, so that a silent address does not use up the others'.
            left = len(addresses) - position
            share = None if ends is None else max(ends - loop.time(), 0) / left
            try:
                # An address is not looked up again: what was judged is what is connected to.
                return await self._plain.connect_tcp(
                    address, port, share, local_address, socket_options
                )
            except (httpcore.ConnectError, httpcore.ConnectTimeout):
                if left == 1:
                    raise
        raise AssertionError("a host without addresses was let through")

    async def sleep(self, seconds: float) -> None:
        await self._plain.sleep(seconds)


class _Body(httpx.AsyncByteStream):
    """A response's body, as it comes."""

    def __init__(self, response: httpcore.Response) -> None:
        self._response = response

    async def __aiter__(self) -> AsyncIterator[bytes]:
        with _errors_of_httpx():
            async for part in self._response.aiter_stream():
                yield part

    async def aclose(self) -> None:
        await self._response.aclose()


@contextlib.contextmanager
def _errors_of_httpx() -> Iterator[None]:
    """httpcore's errors as httpx's of the same names."""
    try:
        yield
    except Exception as error:
        if not type(error).__module__.startswith("httpcore"):
            raise
        kind = getattr(httpx, type(error).__name__, httpx.TransportError)
        raise kind(str(error)) from error
