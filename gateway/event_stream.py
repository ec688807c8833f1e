"""Cog's events of a prediction, and how they travel: server-sent events (WHATWG HTML, section 9.2)."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import httpx
from httpx_sse import EventSource

CONTENT_TYPE = "text/event-stream"
# A comment: proxies cut off what is silent for a minute, and clients read over it.
KEEP_ALIVE = b": waiting\n\n"


@dataclass(frozen=True)
class Event:
    """One event: `start`, `log`, `metric`, `output`, `completed`, and what it says."""

    name: str
    data: dict[str, Any]

    def encode(self) -> bytes:
        text = json.dumps(self.data, ensure_ascii=False, separators=(",", ":"))
        return f"event: {self.name}\ndata: {text}\n\n".encode()


async def read_events(response: httpx.Response) -> AsyncIterator[Event]:
    """The events of an answer as they come. Raises ValueError for what is none of Cog's."""
    async for sent in EventSource(response).aiter_sse():
        data = json.loads(sent.data)
        if not isinstance(data, dict):
            raise ValueError(  # noqa: TRY004 - of the same kind as text that is no JSON
                f"an event named {sent.event[:40]!r} holds no object"
            )
        yield Event(sent.event, data)


def asks_for_events(accept: str | None) -> bool:
    return any(
        part.partition(";")[0].strip().lower() == CONTENT_TYPE for part in (accept or "").split(",")
    )
