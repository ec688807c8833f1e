"""Callers who want many predictions of one gateway, and behave as good clients do while it falls and rises.

Ids are their own; what was refused, broken off or not answered is asked for again with the same PUT; who was told 202
looks again. Some wait for the answer, some read events, some go away and are told by webhook.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
from collections import Counter
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

import httpx

OVER = ("succeeded", "failed", "canceled")
# `Retry-After` counts in seconds, and a test has no time for that.
LONGEST_PAUSE_S = 0.4
LOOK_EVERY_S = 0.3
WAYS = ("waits", "streams", "is told")


@dataclass
class Crowd:
    """`await crowd.all(...)` returns when every id has an end; `ended` grows meanwhile."""

    url: str
    webhook: str
    ended: dict[str, dict[str, Any]] = field(default_factory=dict)
    met: Counter[str] = field(default_factory=Counter)
    """What happened to requests: statuses, and connections lost."""
    _progress: asyncio.Condition = field(default_factory=asyncio.Condition)

    async def all(self, ids: list[str], callers: int) -> None:
        waiting = list(reversed(ids))
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=callers)
        async with (
            # The one who waits for all of them has a limit for all.
            httpx.AsyncClient(limits=limits, timeout=None, trust_env=False) as client,  # noqa: S113
            asyncio.TaskGroup() as group,
        ):

            async def call() -> None:
                while waiting:
                    prediction_id = waiting.pop()
                    answer = await self._one(client, prediction_id)
                    async with self._progress:
                        self.ended[prediction_id] = answer
                        self._progress.notify_all()

            for _ in range(callers):
                group.create_task(call())

    async def reached(self, count: int) -> None:
        """Until so many have ended."""
        async with self._progress:
            await self._progress.wait_for(lambda: len(self.ended) >= count)

    async def _one(self, client: httpx.AsyncClient, prediction_id: str) -> dict[str, Any]:
        way = way_of(prediction_id)
        body: dict[str, Any] = {"input": input_of(prediction_id)}
        headers = {}
        if way == "streams":
            headers["Accept"] = "text/event-stream"
        elif way == "is told":
            headers["Prefer"] = "respond-async"
            body |= {"webhook": self.webhook, "webhook_events_filter": ["completed"]}
        address = f"{self.url}/predictions/{prediction_id}"
        while True:
            try:
                async with client.stream("PUT", address, json=body, headers=headers) as answer:
                    self.met[str(answer.status_code)] += 1
                    told = await _last(answer)
                if answer.status_code == HTTPStatus.ACCEPTED:
                    return await self._look(client, address)
            except httpx.TransportError as error:
                self.met[type(error).__name__] += 1
                await _pause(None)
                continue
            if told is not None and told.get("status") in OVER:
                return told
            if answer.status_code not in (200, 429, 503):
                raise AssertionError(f"{prediction_id}: {answer.status_code} {told}")
            await _pause(answer.headers.get("retry-after"))

    async def _look(self, client: httpx.AsyncClient, address: str) -> dict[str, Any]:
        """Until it is over: whoever was told 202 may rely on it, whatever becomes of this gateway."""
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            try:
                answer = await client.get(address)
            except httpx.TransportError as error:
                self.met[f"GET {type(error).__name__}"] += 1
                continue
            self.met[f"GET {answer.status_code}"] += 1
            told: dict[str, Any] = answer.json()
            if told.get("status") in OVER:
                return told
            assert answer.status_code in (200, 503), f"{address}: {answer.status_code} {told}"


def way_of(prediction_id: str) -> str:
    return WAYS[int(prediction_id.rpartition("-")[2]) % len(WAYS)]


def input_of(prediction_id: str) -> dict[str, Any]:
    return {"prompt": f"a picture of {prediction_id}", "seconds": 0.05}


async def _last(answer: httpx.Response) -> dict[str, Any] | None:
    """The answer, or what the last event says where it is a stream; None for one that ended before the prediction."""
    text = (await answer.aread()).decode()
    if answer.headers.get("content-type", "").startswith("text/event-stream"):
        *_, last = ["", *(block for block in text.split("\n\n") if block.startswith("event:"))]
        if not last.startswith("event: completed"):
            return None
        text = last.partition("data: ")[2]
    with contextlib.suppress(ValueError):
        told = json.loads(text)
        return told if isinstance(told, dict) else None
    return None


async def _pause(retry_after: str | None) -> None:
    asked = float(retry_after) if retry_after else LONGEST_PAUSE_S
    await asyncio.sleep(min(asked, LONGEST_PAUSE_S) * random.uniform(0.5, 1.0))
