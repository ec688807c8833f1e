"""A receiver of webhooks on loopback: keeps what arrives, and lets tests wait for it."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from tests.support.asgi import HOST, serving

TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Message:
    headers: dict[str, str]
    body: bytes

    @property
    def id(self) -> str:
        return self.headers["webhook-id"]

    @property
    def answer(self) -> dict[str, Any]:
        answer: dict[str, Any] = json.loads(self.body)
        return answer


@dataclass
class Receiver:
    """Answers with `statuses` in turn, the last of them for ever."""

    url: str = ""
    statuses: list[int] = field(default_factory=lambda: [200])
    messages: list[Message] = field(default_factory=list)
    _arrived: threading.Condition = field(default_factory=threading.Condition)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        body, more = b"", True
        while more:
            part = await receive()
            if part["type"] == "http.disconnect":  # its sender has died over it
                return
            body, more = body + part.get("body", b""), part.get("more_body", False)
        headers = {name.decode(): value.decode() for name, value in scope["headers"]}
        with self._arrived:
            status = self.statuses.pop(0) if len(self.statuses) > 1 else self.statuses[0]
            self.messages.append(Message(headers, body))
            self._arrived.notify_all()
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    def wait_for(self, count: int) -> list[Message]:
        """The messages, once there are so many."""
        self.wait_until(lambda: len(self.messages) >= count)
        return list(self.messages)

    def wait_until(self, holds: Callable[[], bool], seconds: float = TIMEOUT_S) -> None:
        """Until that holds, which only messages can bring about."""
        with self._arrived:
            assert self._arrived.wait_for(holds, seconds)


@contextlib.contextmanager
def receiver() -> Iterator[Receiver]:
    receiving = Receiver()
    with serving(receiving) as port:
        receiving.url = f"http://{HOST}:{port}/hook"
        yield receiving
