"""A prediction's output as Replicate's clients read it while it comes: server-sent events `output`, `error`, `done`."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

from fastapi import Request
from fastapi.responses import StreamingResponse

from gateway.desk import Desk
from gateway.event_stream import CONTENT_TYPE, KEEP_ALIVE, Event
from gateway.refusals import Refused
from gateway.waiting import UNBUFFERED, stream

LOOK_EVERY_S = 1.0
FINISHED = ("succeeded", "failed", "canceled")


class Outputs:
    """Remembers what was told: a prediction that begins anew, and its end, bring outputs again."""

    def __init__(self) -> None:
        self._told = 0
        self._events = 0

    def of(self, event: Event) -> bytes:
        """What an event of Cog's says to a client of Replicate's; empty where that is nothing."""
        match event.name:
            case "output":
                return self._output(event.data.get("index", self._told), event.data.get("chunk"))
            case "completed":
                return self.of_end(event.data)
        return b""

    def of_end(self, answer: dict[str, Any]) -> bytes:
        output = answer.get("output")
        chunks = output if isinstance(output, list) else [] if output is None else [output]
        told = b"".join(self._output(index, chunk) for index, chunk in enumerate(chunks))
        match answer["status"]:
            case "failed":
                detail = json.dumps({"detail": answer.get("error") or "the prediction failed"})
                return told + self._event("error", detail) + self._event("done", _why("error"))
            case "canceled":
                return told + self._event("done", _why("canceled"))
            case "succeeded":
                return told + self._event("done", "{}")
        detail = json.dumps(
            {"detail": "this server stopped, and another goes on: ask for it later"}
        )
        return told + self._event("error", detail) + self._event("done", _why("error"))

    def _output(self, index: int, chunk: Any) -> bytes:
        if index < self._told:
            return b""
        self._told = index + 1
        return self._event("output", chunk if isinstance(chunk, str) else json.dumps(chunk))

    def _event(self, name: str, data: str) -> bytes:
        self._events += 1  # Replicate's Python client passes over events that have no id
        lines = "".join(f"data: {line}\n" for line in data.split("\n"))
        return f"event: {name}\nid: {self._events}\n{lines}\n".encode(errors="replace")


def output_stream(
    desk: Desk, prediction_id: str, answer: dict[str, Any], request: Request
) -> StreamingResponse:
    """`answer` is what is known of it now."""
    outputs = Outputs()
    prediction = desk.find(prediction_id)
    if prediction is not None:
        return stream(desk, prediction, request, encode=outputs.of)
    return StreamingResponse(
        _as_recorded(desk, outputs, answer), media_type=CONTENT_TYPE, headers=UNBUFFERED
    )


async def _as_recorded(
    desk: Desk, outputs: Outputs, answer: dict[str, Any]
) -> AsyncIterator[bytes]:
    """Of one that has finished, or that another replica makes."""
    now: dict[str, Any] | None = answer
    while now is not None and now["status"] not in FINISHED:
        yield KEEP_ALIVE
        await asyncio.sleep(LOOK_EVERY_S)
        with suppress(Refused):  # for a moment, as like as not
            now = await desk.get(answer["id"])
    if now is not None:
        yield outputs.of_end(now)


def _why(reason: str) -> str:
    return json.dumps({"reason": reason})
