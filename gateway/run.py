"""One prediction's way from its claim to its record: claimed, in line, at Cog's server, recorded, told.

Whatever ends it early (its caller, a person, time, this server's end, another replica) comes in by `leave`, and it
still ends with a record that is true.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from datetime import UTC, datetime
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from gateway.event_stream import Event
from gateway.generation import Generation, StoppedError
from gateway.ledger import LEASE_S
from gateway.line import LineFullError, Place
from gateway.logs import bind_prediction
from gateway.prediction import Leaving, Prediction
from gateway.recording import Recording
from gateway.refusals import Refused, another_input, used_before
from gateway.webhooks import WebhookEvent, due
from images.errors import ImagesError, LostLeaseError
from images.prediction import PredictionRecord
from images.records import Claimed, Existing

if TYPE_CHECKING:
    from gateway.desk import Desk

RENEW_S = LEASE_S / 3
ENTER_WITHIN_S = 1.0  # whatever the model tells of itself
LOOK_ELSEWHERE_S = 1.0
LOGS_EVERY_S = 0.5  # as Cog does

_MISTAKE = "the server made a mistake; its log says which"

_log = logging.getLogger(__name__)


class Run:
    """What one task does; the desk begins it and everybody else may `leave` it.

    Args:
        is_new: its id was made here, so nobody else can have it: the claim is written beside the generation.
        claimed: it was claimed already.
    """

    def __init__(
        self,
        desk: Desk,
        prediction: Prediction,
        place: Place,
        *,
        context: dict[str, Any] | None = None,
        is_new: bool = False,
        claimed: Claimed | None = None,
    ) -> None:
        self.prediction = prediction
        self._asked = prediction.record
        self.is_elsewhere = False
        self.has_begun = False
        self.task: asyncio.Task[None]
        self._desk = desk
        self._place: Place | None = place
        self._context = context or {}
        self._is_new = is_new
        self._claimed = claimed
        self._claiming: asyncio.Task[Claimed | Existing] | None = None
        self._leaving: Leaving | None = None
        self._work: asyncio.Task[Any] | None = None
        self._settled = asyncio.Event()
        self._heard = asyncio.Event()
        self._is_entered = False
        self._is_recorded = False
        self._outputs = 0
        self._logs_told_at = -LOGS_EVERY_S
        now = asyncio.get_running_loop().time
        self._now = now
        self._asked_at = now()
        self._begun_at: float | None = None

    def begin(self) -> asyncio.Task[None]:
        self.task = asyncio.create_task(self._run())
        return self.task

    @property
    def is_leaving(self) -> bool:
        return self._leaving is not None

    async def settled(self) -> None:
        """Until it is known whose it is. Raises Refused."""
        await self._settled.wait()
        if self.prediction.refusal is not None:
            raise self.prediction.refusal

    async def outlive_callers(self) -> None:
        """Have it go on without its callers; when this returns, a gateway that comes after this one would find it.

        Raises ImagesError, and Refused as `settled` does.
        """
        prediction, ledger = self.prediction, self._desk.ledger
        prediction.background = True
        await self.settled()
        if self.is_elsewhere:
            await ledger.ask_to_keep(prediction.id)
            return
        if self._claiming is not None:
            self._claimed = self._owned(await asyncio.shield(self._claiming))
        claimed = self._claimed
        if claimed is None or prediction.finished:
            return
        if not self._is_entered:
            await ledger.enter(claimed.record)
            self._is_entered = True
        if not claimed.record.background:
            try:
                self._claimed = await ledger.renew(claimed, background=True)
            except LostLeaseError:  # it is recorded already, or another's
                await ledger.ask_to_keep(prediction.id)

    def leave(self, why: Leaving) -> None:
        """End it. The first reason counts."""
        if self._leaving is None and not self.prediction.finished:
            self._leaving = why
            if self._work is not None:
                self._work.cancel()

    async def _run(self) -> None:
        prediction = self.prediction
        with bind_prediction(prediction.id):
            try:
                await self._through()
            except Refused as refused:
                prediction.refuse(refused)
            except ImagesError as error:
                prediction.refuse(self._desk.bucket_refused(error))
            except asyncio.CancelledError:  # this server's time is over
                if not self._is_recorded:
                    self._ask_again()
                raise
            except Exception:  # noqa: BLE001 - whoever waits is told, whatever it was
                _log.exception("unexpected error")
                prediction.finish("failed", error=_MISTAKE)
            finally:
                self._leave_line()
                self._settled.set()
                prediction.end()

    async def _through(self) -> None:
        if self._claimed is None and not await self._claim():
            return
        if self._leaving is None:  # before what goes on beside it, for which nobody waits
            self._work = asyncio.create_task(self._generate())
        self._settled.set()
        entering = asyncio.create_task(self._enter_meanwhile())
        keeping = asyncio.create_task(self._keep())
        try:
            try:
                refused = await self._generated()
            finally:
                self._heard.set()
            if self._claiming is not None:
                self._claimed = self._owned(await self._claiming)
            keeping.cancel()
            await self._conclude(refused)
            await entering
        finally:
            keeping.cancel()
        self.prediction.end()
        self._measure()
        if self._is_recorded:
            self._tell_end()

    # Whose it is.

    async def _claim(self) -> bool:
        """Whether it is this gateway's to generate; if not, the prediction is what the record says."""
        record = self.prediction.record
        claiming = self._claim_as(record)
        if self._is_new and not self.prediction.background:
            self._claiming = asyncio.create_task(claiming)
            return True
        found = await claiming
        if isinstance(found, Existing):
            if self._leaving is Leaving.ASKED:  # before it was known that another has it
                await self._desk.ledger.ask_to_cancel(record.id)
                self._leaving = None
            following = self._work = asyncio.create_task(self._follow(found))
            await asyncio.wait({following})
            self._work = None
            owned = None if following.cancelled() else following.result()
            if owned is None:
                return False
            found = owned
        self._claimed = found
        # An id that was used before has a past, and the record of it counts.
        self.prediction.record = found.record
        self.prediction.background |= found.record.background
        if self.prediction.background:
            # Whoever is answered "accepted" can count on it: a gateway that comes after this one has to find it.
            self._is_entered = True
            try:
                if not found.record.background:  # somebody has asked for that since
                    self._claimed = await self._desk.ledger.renew(found, background=True)
                await self._desk.ledger.enter(found.record)
            except ImagesError:
                await self._hand_back()
                raise
        return True

    async def _claim_as(self, record: PredictionRecord) -> Claimed | Existing:
        with self._desk.tracing.step("claim"):
            return await self._desk.ledger.claim(record)

    async def _follow(self, found: Existing) -> Claimed | None:
        """Until it is finished wherever it runs, or nobody's any more: then it is claimed."""
        if not found.same_input:
            raise another_input()
        prediction, desk = self.prediction, self._desk
        while True:
            stored = found.stored
            if stored.record.finished and not stored.record.may_run_again:
                prediction.take(await desk.ledger.with_fresh_urls(stored.record))
                desk.metrics.replayed()
                return None
            self.is_elsewhere = True
            self._leave_line()
            prediction.take(stored.record)
            self._settled.set()
            if self._leaving is not None:
                return None
            await asyncio.sleep(LOOK_ELSEWHERE_S)
            now = await desk.ledger.get(prediction.id)
            if now is None or now.abandoned or now.record.may_run_again:
                again = await self._claim_again()
                if again is not None:
                    return again
            else:
                found = Existing(now, same_input=True)

    async def _claim_again(self) -> Claimed | None:
        """Take over what another replica left; None while there is no place in line, or somebody was quicker."""
        try:
            place = self._desk.line.join()
        except LineFullError:
            return None
        try:
            now = {"created_at": datetime.now(UTC)}
            found = await self._claim_as(self._asked.model_copy(update=now))
        except BaseException:
            self._desk.line.leave(place)
            raise
        if not isinstance(found, Claimed):
            self._desk.line.leave(place)
            return None
        self._claimed, self._place, self.is_elsewhere = found, place, False
        self.prediction.begin_again()
        return found

    def _owned(self, found: Claimed | Existing) -> Claimed:
        if isinstance(found, Claimed):
            return found
        raise used_before()

    async def _enter_meanwhile(self) -> None:
        """While it waits in line or is being made: before that, its caller would wait for this too."""
        if self._place is not None and self._place.turn.is_set():
            with suppress(TimeoutError):
                async with asyncio.timeout(ENTER_WITHIN_S):
                    await self._heard.wait()
        if not self._is_entered:
            await self._enter()

    async def _enter(self) -> None:
        """Where the list, and a gateway that comes after this one, find it."""
        try:
            if self._claiming is not None:
                self._owned(await asyncio.shield(self._claiming))
            await self._desk.ledger.enter(self.prediction.record)
            self._is_entered = True
        except (ImagesError, Refused) as error:
            _log.warning("the prediction is not in the list of predictions: %s", error)

    async def _keep(self) -> None:
        """Renew the lease for as long as it lasts, and hear what others have left word of."""
        try:
            if self._claiming is not None:
                self._claimed = self._owned(await asyncio.shield(self._claiming))
        except (ImagesError, Refused):
            self.leave(Leaving.NO_CLAIM)
            return
        while self._claimed is not None:
            if self._claimed.record.cancel_requested:
                self.leave(Leaving.ASKED)
                return
            await asyncio.sleep(RENEW_S)
            now: dict[str, Any] = {
                "status": "processing" if self.prediction.status == "processing" else "starting",
                "started_at": self.prediction.started_at,
            }
            try:
                self._claimed = await self._desk.ledger.renew(self._claimed, **now)
                self.prediction.background |= self._claimed.record.background
            except LostLeaseError as error:
                _log.warning("%s", error)
                self.leave(Leaving.TAKEN_OVER)
                return
            except ImagesError as error:
                _log.warning("the lease could not be renewed, which is tried again: %s", error)

    # Its generation.

    async def _generated(self) -> Refused | None:
        """Wait until it is generated, or left. A Refused is what Cog said of the input."""
        work = self._work
        if work is None:
            return None
        try:
            done, _ = await asyncio.wait({work}, timeout=self._desk.prediction_seconds)
            if not done:
                self.leave(Leaving.TOO_LONG)
                await asyncio.wait({work})
        finally:
            work.cancel()
            self._leave_line()
        if not work.cancelled() and (failure := work.exception()) is not None:
            if isinstance(failure, Refused):
                return failure
            if isinstance(failure, StoppedError):
                self._leaving = Leaving.STOPPING
            else:  # it is recorded as what its callers are told: nobody is to make it again
                _log.error("unexpected error", exc_info=failure)
                self.prediction.finish("failed", error=_MISTAKE)
        return None

    async def _generate(self) -> None:
        prediction, desk = self.prediction, self._desk
        place = self._place
        if place is None:
            raise RuntimeError("it has no place in line")
        with desk.tracing.step("queue"):
            await place.turn.wait()
        with desk.line.timed():
            self.has_begun, self._begun_at = True, self._now()
            await Generation(desk, prediction, self._context, self._hear).run()

    def _hear(self, event: Event) -> None:
        if event.name != "start":  # while the runner is being called, the cores are for it
            self._heard.set()
        self.prediction.hear(event)
        match event.name:
            case "start":
                self._tell("start")
            case "output":
                self._outputs += 1
                self._tell("output", self._outputs)
            case "log" if self._now() - self._logs_told_at >= LOGS_EVERY_S:
                self._logs_told_at = self._now()
                self._tell("logs", len(self.prediction.logs))

    # What came of it.

    async def _conclude(self, refused: Refused | None) -> None:
        """Bring the prediction to its end, and into its record."""
        prediction, desk = self.prediction, self._desk
        again = False
        match self._leaving:
            case None:
                pass
            case _ if prediction.completed_at is not None:
                pass  # it was done first
            case Leaving.ASKED:
                prediction.finish("canceled")
            case Leaving.CALLER_LEFT if await self._is_wanted_elsewhere():
                prediction.refusal = _stopped()
                await self._hand_back()
                return
            case Leaving.CALLER_LEFT:
                prediction.finish("canceled", error="its caller left before it was finished")
                again = True
            case Leaving.TOO_LONG:
                prediction.finish(
                    "failed",
                    error=f"it was not finished within {desk.prediction_seconds:g} s "
                    "(PREDICTION_TIMEOUT_SECONDS), its wait in line included",
                )
                again = True
            case Leaving.STOPPING:
                prediction.refusal = _stopped()
                if prediction.background:
                    await self._hand_back()
                    return
                prediction.finish("canceled", error="the server stopped before it was finished")
                again = True
            case Leaving.TAKEN_OVER | Leaving.NO_CLAIM:
                await self._what_is_recorded()
                return
        if refused is not None:
            prediction.refusal = refused
            prediction.finish("failed", error=refused.args[0])
        await self._record(may_run_again=again)

    async def _is_wanted_elsewhere(self) -> bool:
        """Whether somebody has left word that it is to go on, at another gateway and since the last renewal."""
        if self._claimed is None:
            return False
        try:
            self._claimed = await self._desk.ledger.renew(self._claimed)
        except ImagesError:  # which its recording meets too
            return False
        return self._claimed.record.background

    async def _record(self, *, may_run_again: bool) -> None:
        claimed = self._claimed
        if claimed is None:
            raise RuntimeError("it is not claimed")
        recording = Recording(self._desk, self.prediction, claimed, may_run_again=may_run_again)
        try:
            self._is_recorded = await recording.within_patience()
        except LostLeaseError as error:
            _log.warning("%s", error)
            await self._what_is_recorded()
            return
        if not self._is_recorded:  # its caller has waited for it, and gets it all the same
            self._desk.record_later(self.prediction.id, recording.later(then=self._tell_end))

    def _tell_end(self) -> None:
        if self.prediction.refusal is None:
            self._tell("completed")

    async def _what_is_recorded(self) -> None:
        """Another has it by now, and what it recorded counts; it also tells of it."""
        stored = await self._desk.ledger.get(self.prediction.id)
        if stored is None:
            self.prediction.finish("failed", error="its record was deleted while it was made")
        elif stored.record.finished:
            self.prediction.take(await self._desk.ledger.with_fresh_urls(stored.record))
        else:
            self.prediction.take(stored.record)
            self.prediction.refusal = Refused(
                HTTPStatus.SERVICE_UNAVAILABLE,
                "another server has taken this prediction over: ask for it there, with GET or the same PUT",
                reason="taken_over",
                retry_after_s=1.0,
            )

    def _ask_again(self) -> None:
        """Whoever comes back gets what is recorded, or has it made anew."""
        self.prediction.take(self.prediction.record)
        self.prediction.refusal = _stopped()

    async def _hand_back(self) -> None:
        """To whichever gateway looks first: it need not wait for the lease's end."""
        if self._claimed is not None:
            try:
                await self._desk.ledger.hand_back(self._claimed, status="starting", background=True)
            except ImagesError as error:
                _log.warning("the prediction is taken over only when its lease is over: %s", error)

    def _tell(self, event: WebhookEvent, number: int = 0) -> None:
        record = self.prediction.record
        if record.webhook is not None and due(record.webhook, event):
            self._desk.in_background(
                self._desk.send_webhook(record, event, self.prediction.answer(), number)
            )

    def _measure(self) -> None:
        begun = self._begun_at if self._begun_at is not None else self._now()
        if self.prediction.refusal is None:
            self._desk.metrics.prediction(
                self.prediction.answer(),
                source=self.prediction.source,
                waited_s=begun - self._asked_at,
                ran_s=self._now() - begun,
            )

    def _leave_line(self) -> None:
        if self._place is not None:
            self._desk.line.leave(self._place)
            self._place = None


def _stopped() -> Refused:
    return Refused(
        HTTPStatus.SERVICE_UNAVAILABLE,
        "this server stopped before it was finished: ask again, with the same id",
        reason="draining",
        retry_after_s=1.0,
    )
