"""Cog's events of a prediction, and how they travel: server-sent events (WHATWG HTML, section 9.2)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

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
        return f"event: {self.name}\ndata: {text}\n\n".encode(errors="replace")


class EventReader:
    """Takes an event stream piece by piece, cut anywhere, and gives the events that are whole."""

    def __init__(self) -> None:
        self._rest = b""
        self._name = ""
        self._data: list[str] = []

    def feed(self, piece: bytes) -> Iterator[Event]:
        """Raises ValueError for what is none of Cog's."""
        *lines, self._rest = (self._rest + piece).split(b"\n")
        for line in lines:
            field, _, value = line.removesuffix(b"\r").decode().partition(":")
            value = value.removeprefix(" ")
            if field == "event":
                self._name = value
            elif field == "data":
                self._data.append(value)
            elif not line.strip() and self._data:
                yield self._event()

    def _event(self) -> Event:
        name, text = self._name, "\n".join(self._data)
        self._name, self._data = "", []
        data = json.loads(text)
        if not isinstance(data, dict):
            raise ValueError(  # noqa: TRY004 - of the same kind as text that is no JSON
                f"an event named {name[:40]!r} holds no object"
            )
        return Event(name, data)


def asks_for_events(accept: str | None) -> bool:
    return any(
        part.partition(";")[0].strip().lower() == CONTENT_TYPE for part in (accept or "").split(",")
    )
