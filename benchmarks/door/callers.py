"""Callers: one who asks again and again, and many at once, who ask again a little later where they are refused."""

from __future__ import annotations

import http.client
import json
import random
import threading
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

TIMEOUT_S = 120.0
# Where everything is taken: soon, then less soon, each a little differently, as clients should.
FIRST_PAUSE_S = 0.1
LONGEST_PAUSE_S = 1.0


class PredictionError(RuntimeError):
    """A prediction did not succeed."""


class Caller:
    """One connection that is kept open. Not for several threads."""

    def __init__(self, port: int) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S)
        self.refused = 0

    def ask(self, given: dict[str, Any], *, with_id: bool) -> float:
        """Have one prediction made; returns the seconds of the request that was answered. Raises PredictionError."""
        body = json.dumps({"input": given}).encode()
        method, path = (
            ("PUT", f"/predictions/{uuid.uuid4()}") if with_id else ("POST", "/predictions")
        )
        pause = FIRST_PAUSE_S
        while True:
            started = time.perf_counter()
            self._connection.request(method, path, body, {"Content-Type": "application/json"})
            response = self._connection.getresponse()
            answer = response.read()
            seconds = time.perf_counter() - started
            if response.status not in (HTTPStatus.CONFLICT, HTTPStatus.TOO_MANY_REQUESTS):
                break
            self.refused += 1
            time.sleep(pause * (0.5 + random.random()))
            pause = min(2 * pause, LONGEST_PAUSE_S)
        told = json.loads(answer)
        if response.status != HTTPStatus.OK or told.get("status") != "succeeded":
            raise PredictionError(f"{response.status}: {told.get('error') or told}")
        return seconds

    def close(self) -> None:
        self._connection.close()


@dataclass(frozen=True)
class Rush:
    """What many at once got: all seconds from the first request to the last answer, and how often they were refused."""

    seconds: float
    predictions: int
    refused: int

    @property
    def rate(self) -> float:
        return self.predictions / self.seconds


def rush(port: int, callers: int, inputs: Sequence[dict[str, Any]]) -> Rush:
    """Have all `inputs` made by as many callers, each with ids of its own. Raises PredictionError."""
    waiting = list(inputs)
    failures: list[Exception] = []
    everybody = [Caller(port) for _ in range(callers)]

    def work(caller: Caller) -> None:
        try:
            while not failures:
                try:
                    given = waiting.pop()
                except IndexError:
                    return
                caller.ask(given, with_id=True)
        except Exception as error:  # noqa: BLE001 - the one who measures is told
            failures.append(error)
        finally:
            caller.close()

    threads = [threading.Thread(target=work, args=[caller]) for caller in everybody]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - started
    if failures:
        raise failures[0]
    return Rush(seconds, len(inputs), sum(caller.refused for caller in everybody))
