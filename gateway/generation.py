"""One prediction at Cog's server, from its turn on: asked for anew while the server is busy, or dies over it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from gateway.cog_client import CogBusyError, CogLostError, CogNeverBeganError
from gateway.cog_status import State
from gateway.event_stream import Event
from gateway.prediction import Prediction

if TYPE_CHECKING:
    from gateway.desk import Desk

# A worker that dies three times over one prediction dies of it, as likely as not.
MOST_LOST = 3
FIRST_BUSY_PAUSE_S = 0.02
LONGEST_BUSY_PAUSE_S = 1.0

_log = logging.getLogger(__name__)


class StoppedError(Exception):
    """Cog's server will not come back."""


class Generation:
    """Brings a prediction to its end, and its events to `hear`, all but the last."""

    def __init__(
        self,
        desk: Desk,
        prediction: Prediction,
        context: dict[str, Any],
        hear: Callable[[Event], None],
    ) -> None:
        self._desk = desk
        self._prediction = prediction
        self._context = context
        self._hear = hear

    async def run(self) -> None:
        """Raises Refused for an input that Cog does not take, and StoppedError."""
        prediction = self._prediction
        lost, pause = 0, FIRST_BUSY_PAUSE_S
        while True:
            await self._serving()
            started = False
            try:
                with self._desk.tracing.step("generation", outward=True) as span:
                    events = self._desk.client.predict(
                        prediction.id, prediction.record.input, self._context
                    )
                    async with aclosing(events) as stream:  # type: ignore[type-var]
                        async for event in stream:
                            if event.name == "completed":
                                self._completed(event)
                                span.generated({**event.data, "status": prediction.status})
                                return
                            started = True
                            self._hear(event)
            except CogBusyError:
                pass
            except CogLostError as error:
                lost += started and not isinstance(error, CogNeverBeganError)
                if lost >= MOST_LOST:
                    prediction.finish(
                        "failed",
                        error=f"the model's process died {lost} times while it made this: the log says how",
                    )
                    return
                if started:
                    _log.warning("%s: the prediction begins anew", error)
                    prediction.begin_again()
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_BUSY_PAUSE_S)

    async def _serving(self) -> None:
        """Until Cog's server serves. Raises StoppedError when it will not any more."""
        status = self._desk.cog.status
        while not status.serving:
            if status.state is State.STOPPED:
                raise StoppedError
            status = await self._desk.cog.wait_for_change(status)

    def _completed(self, event: Event) -> None:
        told = event.data
        status = told.get("status")
        self._prediction.finish(
            status if status in ("succeeded", "failed", "canceled") else "failed",
            output=told.get("output"),
            error=told.get("error"),
            metrics=told.get("metrics") or {},
            logs=told.get("logs"),
        )
