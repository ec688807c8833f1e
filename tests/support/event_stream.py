"""A client of Cog's event stream: asks for a prediction and hands its events over as they come."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from types import TracebackType
from typing import Any, Self

from tests.support.cog_server import SLOT_SECONDS, CogServer


@dataclass(frozen=True)
class Event:
    """One server-sent event; `data` is its parsed JSON."""

    name: str
    data: Any


class EventStream:
    """`with EventStream(server, {"prompt": …}) as events:` iterates until the server has no more.

    Leaving the block hangs up, whether the prediction is over or not. A 409 is asked again, as by `predict`.
    """

    def __init__(
        self, server: CogServer, input: Mapping[str, Any], *, timeout: float = 60.0
    ) -> None:
        body = json.dumps({"input": dict(input)})
        headers = {"Content-Type": "application/json", "Accept": "text/event-stream"}
        deadline = time.monotonic() + SLOT_SECONDS
        while True:
            self._connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=timeout)
            self._connection.request("POST", "/predictions", body, headers)
            self.response = self._connection.getresponse()
            if self.response.status != HTTPStatus.CONFLICT or time.monotonic() > deadline:
                break
            self._connection.close()
            time.sleep(0.05)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.response.close()
        self._connection.close()

    def __iter__(self) -> Iterator[Event]:
        name, data = "message", ""
        for line in self.response:
            field, _, value = line.decode("utf-8").rstrip("\r\n").partition(": ")
            if field == "event":
                name = value
            elif field == "data":
                data += value
            elif not field and data:
                yield Event(name, json.loads(data))
                name, data = "message", ""
