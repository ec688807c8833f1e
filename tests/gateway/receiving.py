"""Receivers of webhooks that answer as tests have them, and a sender that is quick to try again."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import logging
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import standardwebhooks

from gateway.addresses import Guard, GuardedTransport, parse_allowed
from gateway.webhooks import (
    WebhookEvent,
    WebhookPatience,
    Webhooks,
)
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
