"""Looks after what other gateways, and this one before its restart, have left: unfinished predictions, untold ends.

Each replica does, and the bucket decides who takes what over.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from datetime import UTC, datetime, timedelta

from gateway.desk import Desk
from gateway.line import LineFullError
from gateway.refusals import Refused
from images.errors import ImagesError, LostLeaseError
from images.records import Claimed, Stored

EVERY_S = 30.0
HORIZON = timedelta(hours=24)
# Each look goes this much further back than there is something left: predictions are entered a little after their time
# of creation, and clocks differ.
ENTERED_LATE = timedelta(seconds=60)
PAGE = 100
MOST_PAGES = 50
# A prediction nobody waits for any more is not made; its caller may come back for it until then.
NOBODY_CAME_S = 600.0
# Whoever finished it is telling its caller at this moment, and says when that is done, or will take longer.
WEBHOOK_LEFT_S = 90.0
MOST_ATTEMPTS = 3

_log = logging.getLogger(__name__)


class Sweep:
    """`run` in a task of its own, until it is cancelled."""

    def __init__(
        self, desk: Desk, *, every_s: float = EVERY_S, webhook_left_s: float = WEBHOOK_LEFT_S
    ) -> None:
        self._desk = desk
        self._every_s = every_s
        self._webhook_left_s = webhook_left_s
        self._complained = False

    async def run(self) -> None:
        back_to = datetime.now(UTC) - HORIZON
        while True:
            looked_while_serving = self._desk.status.serving
            back_to = await self._look(back_to)
            await self._pause(until_serving=not looked_while_serving)

    async def _pause(self, *, until_serving: bool) -> None:
        """What waits for a server need not wait for the next look as well."""
        with suppress(TimeoutError):
            async with asyncio.timeout(self._every_s):
                status = self._desk.status
                while not (until_serving and status.serving):
                    status = await self._desk.cog.wait_for_change(status)

    async def _look(self, back_to: datetime) -> datetime:
        """Look at what was asked for since `back_to`; returns since when there is something left for the next time."""
        before, left = None, datetime.now(UTC)
        try:
            for _ in range(MOST_PAGES):
                page = await self._desk.ledger.recent(PAGE, before, also_settled=False)
                for stored in page.stored:
                    if await self._look_at(stored):
                        left = min(left, stored.record.created_at)
                before = page.before
                if before is None or (
                    page.oldest is not None and page.oldest < back_to - ENTERED_LATE
                ):
                    break
        except ImagesError as error:
            if not self._complained:
                _log.warning(
                    "predictions that another gateway left are not looked for at the moment: %s",
                    error,
                )
            self._complained = True
            return back_to
        self._complained = False
        return max(left, datetime.now(UTC) - HORIZON)

    async def _look_at(self, stored: Stored) -> bool:
        """Do what is due; whether there may be more to do later."""
        record = stored.record
        if self._desk.draining:
            return True
        try:
            if self._desk.has(record.id):
                pass
            elif stored.abandoned:
                if record.background:
                    await self._take_over(stored)
                elif stored.age > record.lease_seconds + NOBODY_CAME_S:
                    await self._end(stored, "canceled", "its server ended before it was finished")
            elif record.webhook_due and stored.age > self._webhook_left_s:
                await self._tell(stored)
        except (LostLeaseError, Refused) as error:
            # Of this one; the others are not to wait for it.
            _log.warning("prediction %s is left as it is: %s", record.name, error)
        except ImagesError:
            raise
        except Exception:  # noqa: BLE001 - and neither for this one
            _log.exception("unexpected error; prediction %s is left as it is", record.name)
        return not record.finished or (stored.record.webhook_due and not self._is_told(stored))

    async def _tell(self, stored: Stored) -> None:
        webhook = stored.record.webhook
        until = None if webhook is None else webhook.tried_until
        if self._is_told(stored) or (until is not None and datetime.now(UTC) < until):
            return
        answer = await self._desk.answer_of(stored)
        self._desk.in_background(self._desk.send_webhook(stored.record, "completed", answer))

    def _is_told(self, stored: Stored) -> bool:
        return self._desk.has_told(stored.record.id, stored.record.completed_at)

    async def _take_over(self, stored: Stored) -> None:
        record = stored.record
        if record.attempts >= MOST_ATTEMPTS:
            error = (
                f"{record.attempts} servers ended before it was finished, so it is not tried again"
            )
            await self._end(stored, "failed", error)
            return
        if not self._desk.status.serving or self._desk.line.is_full:
            return  # another may have room; if not, it is still there the next time
        found = await self._desk.ledger.claim(record)
        if isinstance(found, Claimed):
            _log.info("prediction %s was left unfinished, and is made now", record.name)
            try:
                self._desk.adopt(found)
            except LineFullError:
                await self._desk.ledger.hand_back(found)

    async def _end(self, stored: Stored, status: str, error: str) -> None:
        found = await self._desk.ledger.claim(stored.record)
        if not isinstance(found, Claimed):
            return
        record = await self._desk.ledger.finish(found, status, error=error)
        _log.warning("prediction %s ended: %s", record.name, error)
        again = await self._desk.ledger.get(record.id)
        if again is not None and again.record.webhook_due:
            await self._tell(again)
