"""One prediction as this gateway has it: what is known of it now, and its events from the first on.

It moves nothing by itself: a run (run.py) or whoever follows a record (desk.py) tells it what has happened.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_left
from collections import deque
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from enum import Enum, auto
from typing import Any

from gateway.cog_client import merge_metric
from gateway.event_stream import Event
from gateway.refusals import Refused
from images.prediction import PredictionRecord

# A chatty model may fill neither the memory here nor its record.
LONGEST_LOGS = 256 * 1024  # characters
# Of `log` and `metric` events. More than one read from Cog's server brings, so that who reads along misses none.
MOST_PASSING_BYTES = 4 * 1024 * 1024
# What Python needs for one, beside its text.
EVENT_BYTES = 500
_PASSING = frozenset({"log", "metric"})


class Leaving(Enum):
    """Why a prediction ends before it is done."""

    ASKED = auto()
    CALLER_LEFT = auto()
    TOO_LONG = auto()
    STOPPING = auto()
    TAKEN_OVER = auto()
    NO_CLAIM = auto()


class KeptEvents:
    """Events by their numbers, 0 and up: all of them, but of `log` and `metric` only the newest that have room.

    `completed` says again what those said.
    """

    def __init__(self) -> None:
        self._count = 0
        self._events: dict[int, Event] = {}
        self._lasting: list[int] = []
        self._passing: deque[tuple[int, int]] = deque()  # numbers, and bytes
        self._passing_bytes = 0

    def add(self, event: Event) -> None:
        number = self._count
        self._count += 1
        self._events[number] = event
        if event.name not in _PASSING:
            self._lasting.append(number)
            return
        size = EVENT_BYTES + len(event.encode())
        self._passing.append((number, size))
        self._passing_bytes += size
        while self._passing_bytes > MOST_PASSING_BYTES and len(self._passing) > 1:
            oldest, size = self._passing.popleft()
            del self._events[oldest]
            self._passing_bytes -= size

    def first_from(self, number: int) -> tuple[int, Event] | None:
        """The first that is kept and has this number or a higher one, with its own; None where there is none yet."""
        if number not in self._events:
            # It was dropped, and so was every other that passes before the oldest that is kept.
            place = bisect_left(self._lasting, number)
            later = self._lasting[place : place + 1]
            if self._passing and self._passing[0][0] > number:
                later.append(self._passing[0][0])
            if not later:
                return None
            number = min(later)
        return number, self._events[number]


class Prediction:
    """Made of a record; for one event loop."""

    def __init__(self, record: PredictionRecord, *, source: str = "cog") -> None:
        self.source = source
        self.background = record.background
        """It goes on when nobody waits for it."""
        self.watchers = 0
        self.refusal: Refused | None = None
        """What its callers get in place of its answer."""
        self.take(record)
        self._events = KeptEvents()
        self._changed = asyncio.Event()
        self._over = asyncio.Event()

    def take(self, record: PredictionRecord) -> None:
        """Be what a record says."""
        self._under_way: dict[str, Any] | None = None
        self.record = record
        self.status: str = record.status
        self.output: Any = record.output
        self.error = record.error
        self.logs = record.logs
        self.metrics: dict[str, Any] = dict(record.metrics)
        self.started_at = record.started_at
        self.completed_at = record.completed_at

    @property
    def id(self) -> str:
        return self.record.id

    @property
    def finished(self) -> bool:
        """Nothing of it changes any more, and what there is to record is recorded, unless the bucket would not."""
        return self._over.is_set()

    def answer(self) -> dict[str, Any]:
        """What Cog answers of a prediction, and its times. Fields that have no value yet are left out, as Cog does.

        Until what came of it is recorded it goes on: were this gateway to die now, another would make it anew.
        """
        if self._under_way is not None and not self.finished:
            return dict(self._under_way)
        told: dict[str, Any] = {
            "id": self.id,
            "input": self.record.input,
            "status": self.status,
            "logs": self.logs,
            "metrics": self.metrics,
            "created_at": iso(self.record.created_at),
        }
        known = {
            "output": self.output,
            "error": self.error,
            "started_at": iso(self.started_at),
            "completed_at": iso(self.completed_at),
        }
        return told | {name: value for name, value in known.items() if value is not None}

    def hear(self, event: Event) -> None:
        """Take in an event of Cog's and pass it on. `completed` is for `end`: it is told once it is recorded."""
        match event.name:
            case "start":
                self.status = "processing"
                self.started_at = datetime.now(UTC)
            case "log":
                self.logs = (self.logs + str(event.data.get("data", "")))[-LONGEST_LOGS:]
            case "metric":
                merge_metric(self.metrics, event.data)
            case "output":
                self.output = [*(self.output or []), event.data.get("chunk")]
        self._publish(event)

    def finish(
        self,
        status: str,
        *,
        output: Any = None,
        error: str | None = None,
        metrics: dict[str, Any] | None = None,
        logs: str | None = None,
        completed_at: datetime | None = None,
    ) -> None:
        """Note what came of it; nobody is told before `end`, and nothing changes after it."""
        if self.finished:
            return
        if self._under_way is None:
            self._under_way = self.answer()
        self.status, self.output, self.error = status, output, error
        if metrics is not None:
            self.metrics = metrics
        if logs is not None:
            self.logs = logs[-LONGEST_LOGS:]
        self.completed_at = completed_at or datetime.now(UTC)

    def begin_again(self) -> None:
        """Forget what was made: its server died over it."""
        self._under_way = None
        self.status, self.output, self.error, self.logs = "starting", None, None, ""
        self.metrics, self.started_at, self.completed_at = {}, None, None

    def refuse(self, refused: Refused) -> None:
        """Give its callers this in place of an answer. Its events say it too, where it is not an `ask again`."""
        self.refusal = refused
        self.finish("failed", error=str(refused))

    def end(self) -> None:
        """Tell everybody who waits. Safe to call again. What goes on elsewhere ends here without `completed`."""
        if self.finished:
            return
        self._over.set()
        if self.completed_at is None:
            self._wake()
        else:
            self._publish(Event("completed", self.answer()))

    async def ended(self) -> None:
        await self._over.wait()

    async def events(self) -> AsyncIterator[Event]:
        """From the first on, and then as they happen; ends after `completed`.

        Who comes late, or reads too slowly, misses the older of many `log` and `metric` events.
        """
        number = 0
        while True:
            while (found := self._events.first_from(number)) is not None:
                number = found[0] + 1
                yield found[1]
            if self.finished:
                return
            await self._changed.wait()

    def _publish(self, event: Event) -> None:
        self._events.add(event)
        self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


def iso(moment: datetime | None) -> str | None:
    return None if moment is None else moment.isoformat().replace("+00:00", "Z")
