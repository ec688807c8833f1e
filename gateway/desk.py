"""All predictions of this gateway: who asks gets one that is claimed, waits in line, runs, and is recorded.

What becomes of one from its claim to its record is run.py's; here is what several callers, or several replicas,
have to do with each other. It knows neither HTTP's headers nor S3.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Awaitable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http import HTTPStatus
from typing import Any, Protocol, TypeVar

from gateway.cog_client import CogClient, CogLostError
from gateway.cog_status import Status
from gateway.inputs import Inputs
from gateway.keys import KeyName
from gateway.ledger import Ledger
from gateway.line import Line, LineFullError
from gateway.metrics import Metrics
from gateway.prediction import Leaving, Prediction, iso
from gateway.refusals import Refused, another_input, problem, wrong_input
from gateway.run import Run
from gateway.tracing import Tracing
from gateway.webhooks import WebhookEvent, Webhooks
from images.errors import ImagesError
from images.prediction import PredictionRecord, Webhook
from images.records import Claimed, Existing, Stored

LONGEST_ID = 512  # characters
# Until the model is there, or another replica is: nobody knows, and asking costs little.
COME_BACK_S = 5.0
LAST_WEBHOOKS_S = 5.0
MOST_TOLD = 10_000
MOST_LOOKS = 16

Got = TypeVar("Got")

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Wanted:
    """What a caller asks for."""

    input: dict[str, Any]
    id: str | None = None
    webhook: Webhook | None = None
    background: bool = False
    """It goes on when its caller leaves."""
    caller: KeyName | None = None
    source: str = "cog"
    context: dict[str, Any] = field(default_factory=dict)


class Supervised(Protocol):
    """Cog's server as the desk sees it."""

    @property
    def status(self) -> Status: ...
    async def wait_for_change(self, seen: Status) -> Status: ...


class Desk:
    """Made once, on the event loop; `close` ends it."""

    def __init__(
        self,
        cog: Supervised,
        client: CogClient,
        ledger: Ledger,
        webhooks: Webhooks,
        *,
        slots: int,
        queue_size: int,
        prediction_seconds: float,
        tracing: Tracing | None = None,
    ) -> None:
        self.cog = cog
        self.client = client
        self.ledger = ledger
        self.webhooks = webhooks
        self.line = Line(slots, queue_size)
        self.prediction_seconds = prediction_seconds
        self.tracing = tracing or Tracing()
        self.metrics = Metrics(self)
        self.draining = False
        self._live: dict[str, Run] = {}
        self._background: set[asyncio.Task[None]] = set()
        self._recorded_later: set[str] = set()
        self._inputs: tuple[int, Inputs] | None = None
        self._told: dict[tuple[str, str | None], None] = {}
        self._looks = 0

    # What is measured of it.

    @property
    def status(self) -> Status:
        return self.cog.status

    @property
    def waiting(self) -> int:
        return self.line.waiting

    @property
    def running(self) -> int:
        return self.line.running

    @property
    def slots(self) -> int:
        return self.line.slots

    @property
    def queue_size(self) -> int:
        return self.line.size

    @property
    def open(self) -> bool:
        """Whether a prediction that is asked for now would be made."""
        return self.status.serving and not self.draining

    # What callers ask.

    async def submit(self, wanted: Wanted) -> Prediction:
        """The prediction: new, or the one that has this id already. Raises Refused."""
        prediction_id = wanted.id or f"pred_{secrets.token_hex(12)}"
        if len(prediction_id) > LONGEST_ID:
            raise wrong_input(
                problem(f"an id has at most {LONGEST_ID} characters", "id", kind="value_error")
            )
        given = await self._checked(wanted.input)
        record = self._record(prediction_id, given, wanted)
        while (running := self._live.get(prediction_id)) is not None:
            if running.prediction.record.input_sha256 != record.input_sha256:
                raise another_input()
            if not running.is_leaving:
                if wanted.background:
                    await self._outliving(running)
                else:
                    await running.settled()
                return running.prediction
            # Its last caller has just left; this one wants it after all, once it is out of the way. Its task, not its
            # end: a moment lies between them, in which this loop would turn for ever.
            await asyncio.wait({running.task})
        if not self.open:
            return await self._earlier(wanted, record)
        try:
            place = self.line.join()
        except LineFullError:
            return await self._earlier(wanted, record)
        prediction = Prediction(record, source=wanted.source)
        run = Run(self, prediction, place, context=wanted.context, is_new=wanted.id is None)
        self._start(run)
        await run.settled()
        if wanted.background:  # it may run elsewhere, for somebody who may leave
            await self._outliving(run)
        return prediction

    async def get(self, prediction_id: str) -> dict[str, Any] | None:
        """The answer of a prediction as it is now; None where there is none. Raises Refused."""
        if (running := self._live.get(prediction_id)) is not None:
            return running.prediction.answer()
        stored = await self._read(self.ledger.get(prediction_id))
        return None if stored is None else await self.answer_of(stored)

    async def recent(
        self, limit: int, before: str | None
    ) -> tuple[list[dict[str, Any]], str | None]:
        """Answers, newest first, and the place to go on from: `before` is one (records.PLACE). Raises Refused."""
        page = await self._read(self.ledger.recent(limit, before))
        signed = await self._read(
            self.ledger.all_with_fresh_urls([stored.record for stored in page.stored])
        )
        return [
            running.prediction.answer()
            if (running := self._live.get(record.id)) is not None
            else Prediction(record).answer()
            for record in signed
        ], page.before

    async def cancel(self, prediction_id: str) -> bool:
        """Whether there was something to cancel. Another replica's is left word, and cancelled within seconds."""
        running = self._live.get(prediction_id)
        if running is not None and not running.is_elsewhere:
            running.leave(Leaving.ASKED)
            return True
        return await self._read(self.ledger.ask_to_cancel(prediction_id))

    @contextmanager
    def watching(self, prediction: Prediction) -> Iterator[None]:
        """For as long as a caller waits for it. Without any, what does not go on in the background is cancelled."""
        prediction.watchers += 1
        try:
            yield
        finally:
            prediction.watchers -= 1
            running = self._live.get(prediction.id)
            if (
                running is not None
                and running.prediction is prediction
                and not prediction.watchers
                and not prediction.background
                and not prediction.finished
            ):
                running.leave(Leaving.CALLER_LEFT)

    def refuse_for_good(self) -> None:
        """Take nothing new from now on."""
        self.draining = True

    async def close(self, grace: float) -> None:
        """Let what runs finish, for `grace` seconds, and give back what has not begun. Returns when all is told."""
        self.refuse_for_good()
        for run in list(self._live.values()):
            if not run.has_begun:
                run.leave(Leaving.STOPPING)
        running = [run.task for run in self._live.values()]
        if running:
            await asyncio.wait(running, timeout=grace)
        for run in list(self._live.values()):
            run.leave(Leaving.STOPPING)
        left = [run.task for run in self._live.values()]
        if left:
            await asyncio.wait(left, timeout=LAST_WEBHOOKS_S)
        if self._background:
            await asyncio.wait(self._background, timeout=LAST_WEBHOOKS_S)
        for task in [*left, *self._background]:
            task.cancel()
        self.metrics.close()

    # What the sweep asks (sweep.py).

    def adopt(self, claimed: Claimed) -> None:
        """Run what another gateway left behind, and was claimed from it. Raises LineFullError."""
        prediction = Prediction(claimed.record)
        self._start(Run(self, prediction, self.line.join(), claimed=claimed))

    async def send_webhook(
        self,
        record: PredictionRecord,
        event: WebhookEvent,
        answer: dict[str, Any],
        number: int = 0,
    ) -> None:
        """Tell the caller of this record's prediction, and note how that goes when it is the end of it."""
        if record.webhook is None:
            return
        completed_at = answer.get("completed_at")
        end = None if completed_at is None else datetime.fromisoformat(completed_at)
        is_end = event == "completed"
        if is_end:
            self._told[record.id, completed_at] = None
            while len(self._told) > MOST_TOLD:
                del self._told[next(iter(self._told))]

        async def note(**told: datetime) -> None:
            try:
                await self.ledger.note_webhook(record.id, end, **told)
            except ImagesError as error:
                _log.warning("a webhook may be sent again: %s", error)

        async def note_patience(until: datetime) -> None:
            await note(tried_until=until)

        with self.tracing.step("webhook", outward=True):
            delivered = await self.webhooks.send(
                record.webhook.url,
                event,
                answer,
                number,
                rerun=record.reruns,
                before_more=note_patience,
            )
        self.metrics.webhook(event, bool(delivered))
        if is_end:
            now = datetime.now(UTC)
            if delivered is not None:  # else it was our fault, and another may fare better
                await (note(sent_at=now) if delivered else note(gave_up_at=now))

    def has_told(self, prediction_id: str, completed_at: datetime | None) -> bool:
        """Whether this end was told here, is being told, or was given up: not to be begun again by the sweep."""
        return (prediction_id, iso(completed_at)) in self._told

    def has(self, prediction_id: str) -> bool:
        """Whether it is under way here, its recording included."""
        return prediction_id in self._live or prediction_id in self._recorded_later

    def would_join(self, prediction_id: str) -> bool:
        """Whether who asks for it now gets one that is under way for somebody else."""
        running = self._live.get(prediction_id)
        return running is not None and not running.is_leaving

    def find(self, prediction_id: str) -> Prediction | None:
        """The one that is made here at the moment. None for all others, finished ones among them."""
        running = self._live.get(prediction_id)
        return None if running is None or running.is_elsewhere else running.prediction

    def is_elsewhere(self, prediction: Prediction) -> bool:
        """Whether another replica makes it."""
        running = self._live.get(prediction.id)
        return running is not None and running.is_elsewhere

    def in_background(self, work: Any) -> None:
        """Something that no caller waits for, and `close` does for a moment."""
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    def record_later(self, prediction_id: str, recording: Coroutine[Any, Any, None]) -> None:
        """Go on with what the bucket has not taken so far; the sweep leaves it alone meanwhile."""

        async def record() -> None:
            try:
                await recording
            finally:
                self._recorded_later.discard(prediction_id)

        self._recorded_later.add(prediction_id)
        self.in_background(record())

    def _start(self, run: Run) -> None:
        self._live[run.prediction.id] = run

        def forget(_: asyncio.Task[None]) -> None:
            if self._live.get(run.prediction.id) is run:
                del self._live[run.prediction.id]

        run.begin().add_done_callback(forget)

    async def _outliving(self, running: Run) -> None:
        """Once it goes on without its caller, and another gateway would find it. Raises Refused."""
        try:
            await running.outlive_callers()
        except ImagesError as error:
            raise self.bucket_refused(error) from error

    async def _checked(self, given: dict[str, Any]) -> dict[str, Any]:
        """The input, if the model takes it. Before the model is there, nobody knows what it takes."""
        if self.status.serving and (
            self._inputs is None or self._inputs[0] != self.status.restarts
        ):
            with suppress(CogLostError):  # what is refused then, is refused by Cog
                self._inputs = self.status.restarts, await self.client.inputs()
        return self._inputs[1].check(given) if self._inputs else given

    def _record(
        self, prediction_id: str, given: dict[str, Any], wanted: Wanted
    ) -> PredictionRecord:
        try:
            return PredictionRecord.of(
                prediction_id,
                given,
                created_at=datetime.now(UTC),
                webhook=wanted.webhook,
                background=wanted.background,
            )
        except ImagesError as error:
            raise wrong_input(problem(str(error), kind="value_error")) from None

    async def _earlier(self, wanted: Wanted, record: PredictionRecord) -> Prediction:
        """A result that is there needs no card, and no place in line. Raises Refused where there is none."""
        # A bucket is not asked by more than some at once for those who are turned away.
        if wanted.id is not None and not self.draining and self._looks < MOST_LOOKS:
            self._looks += 1
            try:
                stored = await self.ledger.get(wanted.id)
            except ImagesError as error:
                if not self.open:
                    raise self.bucket_refused(error) from error
                _log.warning("whether it is recorded is not known, and the line is full: %s", error)
                stored = None
            finally:
                self._looks -= 1
            if stored is not None and stored.record.finished and not stored.record.may_run_again:
                existing = Existing(stored, _same_input(stored, record))
                return await self.earlier(existing, wanted.source)
        if self.draining:
            raise Refused(
                HTTPStatus.SERVICE_UNAVAILABLE,
                "this server is about to stop and takes nothing new: ask again, another may answer",
                reason="draining",
                retry_after_s=1.0,
            )
        if not self.status.serving:
            raise Refused(
                HTTPStatus.SERVICE_UNAVAILABLE,
                f"the model is not ready ({self.status.state.value}): GET /ready says when it is",
                reason="not_serving",
                retry_after_s=COME_BACK_S,
            )
        raise Refused(
            HTTPStatus.TOO_MANY_REQUESTS,
            f"{self.waiting} predictions are waiting already, the most that may: try again later",
            reason="queue_full",
            retry_after_s=self.line.advice_s,
        )

    async def earlier(self, existing: Existing, source: str = "cog") -> Prediction:
        """The prediction of a finished record, with URLs that work. Raises Refused for another input."""
        if not existing.same_input:
            raise another_input()
        self.metrics.replayed()
        record = await self._read(self.ledger.with_fresh_urls(existing.stored.record))
        prediction = Prediction(record, source=source)
        prediction.end()
        return prediction

    async def answer_of(self, stored: Stored) -> dict[str, Any]:
        """What is answered of a record, with URLs that work. Raises Refused."""
        return Prediction(await self._read(self.ledger.with_fresh_urls(stored.record))).answer()

    async def _read(self, reading: Awaitable[Got]) -> Got:
        try:
            return await reading
        except ImagesError as error:
            raise self.bucket_refused(error) from error

    def bucket_refused(self, error: ImagesError) -> Refused:
        _log.error("%s", error)
        return Refused(
            HTTPStatus.SERVICE_UNAVAILABLE,
            "the bucket that keeps predictions and images cannot be used at the moment; the server's log says why",
            reason="bucket",
            retry_after_s=COME_BACK_S,
        )


def _same_input(stored: Stored, record: PredictionRecord) -> bool:
    return stored.record.input_sha256 == record.input_sha256
