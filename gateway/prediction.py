"""One prediction as this gateway has it: what is known of it now, and its events from the first on.

It moves nothing by itself: a run (run.py) or whoever follows a record (desk.py) tells it what has happened.
"""

from __future__ import annotations

import asyncio
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


class Leaving(Enum):
    """Why a prediction ends before it is done."""

    ASKED = auto()
    CALLER_LEFT = auto()
    TOO_LONG = auto()
    STOPPING = auto()
    TAKEN_OVER = auto()
    NO_CLAIM = auto()


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
        self._events: list[Event] = []
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
        """From the first on, and then as they happen; ends after `completed`."""
        told = 0
        while True:
            while told < len(self._events):
                event = self._events[told]
                told += 1
                yield event
            if self.finished:
                return
            await self._changed.wait()

    def _publish(self, event: Event) -> None:
        self._events.append(event)
        self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


def iso(moment: datetime | None) -> str | None:
    return None if moment is None else moment.isoformat().replace("+00:00", "Z")
