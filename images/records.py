"""The durable record of each prediction, beside its images: who works on it, and what came of it.

Whoever claims an id first generates it; everybody after that, on any replica, gets what is recorded. A claim is a lease
that its owner renews; when it ends unfinished, one other takes it over. It knows nothing of who asks, or how.
"""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from images.conditional import ChangedError, ConditionalBucket, Document
from images.errors import LostLeaseError, RecordError
from images.prediction import (
    LARGEST_RECORD,
    Outcome,
    PredictionRecord,
    parse_record,
    record_name,
    time_of,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from pydantic import JsonValue

    from s3.async_client import AsyncClient

FOLDER = "predictions"
LEASE_SECONDS = 60.0
LARGEST_PAGE = 1000  # what S3 lists in one answer
_ATTEMPTS = 10  # at one change, while others keep changing the same record
_READERS = 8
_MOST_SETTLED = 10_000
# What `recent` gives and takes as a place in the list.
PLACE = r"^[0-9]{13}-[A-Za-z0-9._-]{1,80}$"

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Stored:
    """A record as it was read; `age` is how long ago it was written, by the bucket's own clock, in seconds."""

    record: PredictionRecord
    etag: str
    age: float

    @property
    def abandoned(self) -> bool:
        """Unfinished, and its owner has not been heard of for longer than it said."""
        return not self.record.finished and self.age >= self.record.lease_seconds


@dataclass(frozen=True)
class Claimed:
    """The prediction is the caller's: generate it, `renew` meanwhile, and `finish`."""

    record: PredictionRecord
    etag: str


@dataclass(frozen=True)
class Existing:
    """The id was claimed before. With another input (`same_input`) it is another prediction: refuse it."""

    stored: Stored
    same_input: bool


@dataclass(frozen=True)
class Page:
    """Predictions, newest first, and what to pass as `before` for those that follow; None at the end."""

    stored: tuple[Stored, ...]
    before: str | None
    oldest: datetime | None
    """When the last place on it was claimed, whether or not it was read; None where it has none."""


class RecordStore:
    """The predictions' records in the image bucket, for one event loop.

    Every method raises RecordError, which names the object, the cause and what to try, and holds no secret. Requests:
    2 or 3 PUTs once to try the server; 1 PUT to claim, 1 to enter, 1 for each renewal, 1 to finish; for an id that
    exists 1 PUT and 1 GET, and 1 or 2 PUTs more to take it over; 1 PUT to hand it back; 1 GET to get; 1 GET and 1 PUT
    to leave word or note a webhook; 1 LIST and 1 GET per prediction for a page, but for those that are left out of it.
    """

    def __init__(
        self, client: AsyncClient, bucket: str, prefix: str = "", owner: str | None = None
    ) -> None:
        """`owner` is this replica's name in the records: random unless given."""
        self.prefix = "/".join([*filter(None, prefix.split("/")), FOLDER])
        self.owner = owner or secrets.token_hex(8)
        self._documents = ConditionalBucket(
            client, bucket, f"{self.prefix}/conditional-writes", LARGEST_RECORD
        )
        self._settled: dict[str, None] = {}  # places, in the order in which they were seen

    def key(self, prediction_id: str) -> str:
        """Where the id's record lies."""
        return f"{self.prefix}/{record_name(prediction_id)}.json"

    async def claim(
        self, record: PredictionRecord, lease_seconds: float = LEASE_SECONDS
    ) -> Claimed | Existing:
        """Make the prediction the caller's if it is nobody's, of somebody who was not heard of for too long, or may run
        again.

        Exactly one of many wins. What is taken over has the time of creation of who takes it, and is in the list there,
        and the new webhook if there is one; with another input than the recorded one it is not taken over.
        """
        key, mine = self.key(record.id), self._claimed_by_me(record, lease_seconds, record)
        for _ in range(_ATTEMPTS):
            try:
                return Claimed(mine, await self._documents.create(key, mine.dump()))
            except ChangedError:
                stored = await self.get(record.id)
            if stored is None:
                continue
            if stored.record.claim == mine.claim:  # the answer was lost, and the client asked again
                return Claimed(stored.record, stored.etag)
            same_input = stored.record.input_sha256 == record.input_sha256
            if not (same_input and (stored.abandoned or stored.record.may_run_again)):
                return Existing(stored, same_input)
            mine = self._claimed_by_me(stored.record, lease_seconds, record)
            if mine.place_in_time != stored.record.place_in_time:
                await self.enter(
                    mine
                )  # first, as somebody may count on it: it is in the list all the time
            try:
                return Claimed(mine, await self._documents.replace(key, mine.dump(), stored.etag))
            except ChangedError:
                continue
        raise self._contended(key)

    async def enter(self, record: PredictionRecord) -> None:
        """Make `recent` find it: once after each claim, and best while it is already being generated."""
        await self._documents.put(f"{self._by_time}{record.place_in_time}", b"")

    async def renew(
        self, claimed: Claimed, lease_seconds: float | None = None, **changes: Any
    ) -> Claimed:
        """Begin the lease anew, and note how far it is (`status`, `started_at`, `metrics`).

        Use what it returns from now on. Raises LostLeaseError when another has taken the prediction over, or it is
        finished: stop generating it.
        """
        if lease_seconds is not None:
            changes["lease_seconds"] = lease_seconds
        return await self._change(claimed, changes)

    async def hand_back(self, claimed: Claimed, **changes: Any) -> None:
        """Let another have it at once. Whoever gives back has not died over it: `attempts` counts who did.

        Raises LostLeaseError as `renew` does.
        """
        attempts = claimed.record.attempts - 1
        await self._change(claimed, {"lease_seconds": 0.0, "attempts": attempts, **changes})

    async def finish(
        self,
        claimed: Claimed,
        status: Outcome,
        *,
        output: JsonValue = None,
        error: str | None = None,
        metrics: Mapping[str, JsonValue] | None = None,
        logs: str = "",
        started_at: datetime | None = None,
        completed_at: datetime | None = None,
        may_run_again: bool = False,
    ) -> PredictionRecord:
        """Record what came of it, for good: no later call changes it, unless it `may_run_again` and is claimed anew.

        Raises LostLeaseError when another has taken the prediction over, or it is finished: what is recorded counts,
        and what the caller has is to be thrown away.
        """
        changes: dict[str, Any] = {
            "status": status,
            "output": output,
            # They may quote what a caller sent, half a character included, and have to be told all the same.
            "error": None if error is None else _whole(error),
            "logs": _whole(logs),
            "started_at": started_at or claimed.record.started_at,
            "metrics": {**claimed.record.metrics, **(metrics or {})},
            "completed_at": completed_at or datetime.now(UTC),
            "may_run_again": may_run_again,
        }
        finished = (await self._change(claimed, changes)).record
        self._note_if_settled(finished)
        return finished

    async def ask_to_cancel(self, prediction_id: str) -> bool:
        """Leave word for whoever owns it; False where there is none, or it is finished. One GET and one PUT."""

        def canceled(record: PredictionRecord) -> PredictionRecord | None:
            return None if record.finished else record.changed(cancel_requested=True)

        return await self._rewrite(prediction_id, canceled)

    async def ask_to_keep(self, prediction_id: str) -> bool:
        """Leave word that it is to go on without its caller (`background`); False where none is needed, or possible."""

        def kept(record: PredictionRecord) -> PredictionRecord | None:
            is_said = record.finished or record.background
            return None if is_said else record.changed(background=True)

        return await self._rewrite(prediction_id, kept)

    async def note_webhook(
        self, prediction_id: str, completed_at: datetime | None, **told: datetime
    ) -> None:
        """Note how far its caller is told of this end (`sent_at`, `gave_up_at`, `tried_until`). One GET and one PUT.

        It is all that changes in a finished record; of an end that was told, or of another, nothing is noted. Two
        replicas may still tell of one end: what they send has to carry the prediction's id.
        """

        def noted(record: PredictionRecord) -> PredictionRecord | None:
            if not record.webhook_due or record.completed_at != completed_at:
                return None
            return record.changed(webhook={**dict(record.webhook or {}), **told})

        await self._rewrite(prediction_id, noted)

    async def get(self, prediction_id: str) -> Stored | None:
        """The id's record, or None where there is none."""
        key = self.key(prediction_id)
        found = await self._documents.read(key)
        return None if found is None else self._parse(key, found, prediction_id)

    async def recent(
        self, limit: int, before: str | None = None, *, also_settled: bool = True
    ) -> Page:
        """A page of at most `limit` (1 to 1000) predictions that were entered, newest first.

        `before` is what the page before it gave; the times are those of the replicas that claimed them. What cannot
        be understood is left out, with a warning in the log, so a page may be shorter; without `also_settled` so is
        what this store has seen settled before, which is then not read either.
        """
        if before is not None and not re.fullmatch(PLACE, before):
            raise RecordError(f"{before[:100]!r} is no place in the list: pass what a page gave")
        listing = await self._documents.list(
            self._by_time,
            after=f"{self._by_time}{before}" if before else "",
            limit=min(max(limit, 1), LARGEST_PAGE),
        )
        places = [key.removeprefix(self._by_time) for key in listing.keys]
        reading = asyncio.Semaphore(_READERS)

        async def read(place: str) -> Stored | None:
            async with reading:
                return await self._at(place)

        reads = [
            asyncio.create_task(read(place))
            for place in places
            if also_settled or place not in self._settled
        ]
        try:
            found = await asyncio.gather(*reads)
        finally:
            for task in reads:  # the others, where one has failed
                task.cancel()
        last = places[-1] if places else None
        return Page(
            tuple(filter(None, found)),
            before=last if listing.is_truncated else None,
            oldest=None if last is None else time_of(last),
        )

    @property
    def _by_time(self) -> str:
        return f"{self.prefix}/by-time/"

    async def _at(self, place: str) -> Stored | None:
        _, _, name = place.partition("-")
        key = f"{self.prefix}/{name}.json"
        found = await self._documents.read(key)
        if found is None:
            return None
        try:
            stored = self._parse(key, found, None)
        except RecordError as error:
            _log.warning("left out of the list of predictions: %s", error)
            return None
        # One that was deleted and made again under the same id has a later place too.
        return stored if stored.record.place_in_time == place else None

    def _parse(self, key: str, found: Document, prediction_id: str | None) -> Stored:
        record = parse_record(found.data, prediction_id, self._documents.url(key))
        self._note_if_settled(record)
        return Stored(record, found.etag, found.age)

    def _note_if_settled(self, record: PredictionRecord) -> None:
        if record.settled:
            self._settled[record.place_in_time] = None
            while len(self._settled) > _MOST_SETTLED:
                del self._settled[next(iter(self._settled))]

    def _claimed_by_me(
        self, found: PredictionRecord, lease_seconds: float, asked: PredictionRecord
    ) -> PredictionRecord:
        # Not checked again: `found` was, and the rest is of our own making.
        webhook = asked.webhook or found.webhook
        return found.model_copy(
            update={
                "created_at": asked.created_at,
                "owner": self.owner,
                "claim": secrets.token_hex(16),
                # What ended and may run again has killed nobody.
                "attempts": 1 if found.may_run_again else found.attempts + 1,
                "reruns": found.reruns + found.may_run_again,
                "lease_seconds": lease_seconds,
                "status": "starting",
                "output": None,
                "error": None,
                "metrics": {},
                "logs": "",
                "started_at": None,
                "completed_at": None,
                "webhook": webhook and webhook.untold(),
                "background": asked.background or (found.background and not found.finished),
                "cancel_requested": found.cancel_requested and not found.finished,
                "may_run_again": False,
            }
        )

    async def _rewrite(
        self,
        prediction_id: str,
        change: Callable[[PredictionRecord], PredictionRecord | None],
    ) -> bool:
        """Change a record whoever owns it; False where there is none, or `change` gives None."""
        key = self.key(prediction_id)
        for _ in range(_ATTEMPTS):
            stored = await self.get(prediction_id)
            changed = None if stored is None else change(stored.record)
            if stored is None or changed is None:
                return False
            try:
                await self._documents.replace(key, changed.dump(), stored.etag)
            except ChangedError:
                continue
            return True
        raise self._contended(key)

    async def _change(self, claimed: Claimed, changes: dict[str, Any]) -> Claimed:
        """Write changes if the claim still holds. Renewing and finishing may happen at once."""
        key, current = self.key(claimed.record.id), claimed
        wanted = current.record.changed(**changes)
        for _ in range(_ATTEMPTS):
            data = wanted.dump()
            try:
                return Claimed(wanted, await self._documents.replace(key, data, current.etag))
            except ChangedError:
                found = await self._documents.read(key)
            if found is not None and found.data == data:  # written, and the answer was lost
                return Claimed(wanted, found.etag)
            if found is not None and wanted.finished:
                # The same end, written by a call that was given up before its answer came.
                stored = self._parse(key, found, claimed.record.id)
                if _is_changed(stored.record, claimed, changes):
                    return Claimed(stored.record, stored.etag)
            current = self._still_mine(key, found, claimed)
            wanted = current.record.changed(**changes)
        raise self._contended(key)

    def _still_mine(self, key: str, found: Document | None, claimed: Claimed) -> Claimed:
        what = f"prediction {claimed.record.name} is no longer this replica's to record"
        url = self._documents.url(key)
        if found is None:
            raise LostLeaseError(f"{what}: {url} was deleted meanwhile. Send it again to repeat it")
        stored = self._parse(key, found, claimed.record.id)
        if stored.record.claim != claimed.record.claim:
            raise LostLeaseError(
                f"{what}: its lease was over, and {stored.record.owner} took it over ({url})"
            )
        if stored.record.finished:
            raise LostLeaseError(f"{what}: {url} is finished already ({stored.record.status})")
        return Claimed(stored.record, stored.etag)

    def _contended(self, key: str) -> RecordError:
        return RecordError(
            f"cannot write {self._documents.url(key)}: others keep changing it. Try again"
        )


def _is_changed(record: PredictionRecord, claimed: Claimed, changes: Mapping[str, Any]) -> bool:
    """Whether it is what a claim was to be changed into."""
    mine = record.claim == claimed.record.claim
    return mine and record == record.changed(**changes)


def _whole(text: str) -> str:
    return text.encode(errors="replace").decode()
