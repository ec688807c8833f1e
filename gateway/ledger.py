"""The durable records of predictions, and their images, with a limit on how long the gateway waits for them.

What it raises is the room's own: RecordError and LostLeaseError.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from typing import Any, TypeVar, TypeVarTuple

from images.errors import RecordError
from images.prediction import PredictionRecord
from images.records import Claimed, Existing, Page, RecordStore, Stored
from images.store import ImageStore, ReadImage

# A replica that is gone without a word is noticed this much later; one that lives says so three times meanwhile.
LEASE_S = 30.0
THREADS = 16  # for images, which are read whole
# The client's own limits are for each of its attempts.
ANSWER_WITHIN_S = 10.0

Got = TypeVar("Got")
Given = TypeVarTuple("Given")


class Ledger:
    """Records and images of one bucket, for one event loop."""

    def __init__(
        self, records: RecordStore, images: ImageStore, *, keys_may_block: bool = False
    ) -> None:
        """`keys_may_block`: the machine is asked for the keys that sign URLs, now and again, and may take its time."""
        self._records = records
        self._images = images
        self._keys_may_block = keys_may_block
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="images")

    def close(self) -> None:
        """Without waiting for what a bucket does not answer."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def claim(self, record: PredictionRecord) -> Claimed | Existing:
        return await _in_time(self._records.claim(record, LEASE_S))

    async def enter(self, record: PredictionRecord) -> None:
        await _in_time(self._records.enter(record))

    async def renew(self, claimed: Claimed, **changes: Any) -> Claimed:
        return await _in_time(self._records.renew(claimed, **changes))

    async def hand_back(self, claimed: Claimed, **changes: Any) -> None:
        await _in_time(self._records.hand_back(claimed, **changes))

    async def finish(self, claimed: Claimed, status: Any, **what: Any) -> PredictionRecord:
        return await _in_time(self._records.finish(claimed, status, **what))

    async def get(self, prediction_id: str) -> Stored | None:
        return await _in_time(self._records.get(prediction_id))

    async def recent(self, limit: int, before: str | None, *, also_settled: bool = True) -> Page:
        return await _in_time(self._records.recent(limit, before, also_settled=also_settled))

    async def ask_to_cancel(self, prediction_id: str) -> bool:
        return await _in_time(self._records.ask_to_cancel(prediction_id))

    async def ask_to_keep(self, prediction_id: str) -> bool:
        return await _in_time(self._records.ask_to_keep(prediction_id))

    async def note_webhook(
        self, prediction_id: str, completed_at: datetime | None, **told: datetime
    ) -> None:
        await _in_time(self._records.note_webhook(prediction_id, completed_at, **told))

    async def with_fresh_urls(self, record: PredictionRecord) -> PredictionRecord:
        """The record with its URLs signed again: those in it end with their time. Raises ImagesError."""
        if not self._keys_may_block:
            return self._signed(record)
        return await self._on_thread(self._signed, record)

    async def all_with_fresh_urls(
        self, records: Sequence[PredictionRecord]
    ) -> list[PredictionRecord]:
        """The same of many, for which signing takes long: 60 ms for a hundred records of four images."""
        return await self._on_thread(lambda: [self._signed(record) for record in records])

    def _signed(self, record: PredictionRecord) -> PredictionRecord:
        return record.model_copy(update={"output": self._images.signed_anew(record.output)})

    async def image(self, url: str) -> ReadImage:
        """What a URL in a prediction's output leads to. Raises ImagesError."""
        return await self._on_thread(self._images.read, url)

    async def _on_thread(self, work: Callable[[*Given], Got], *given: *Given) -> Got:
        loop = asyncio.get_running_loop()
        return await _in_time(loop.run_in_executor(self._threads, work, *given))


async def _in_time(asked: Awaitable[Got]) -> Got:
    try:
        async with asyncio.timeout(ANSWER_WITHIN_S):
            return await asked
    except TimeoutError:
        raise RecordError(
            f"the bucket of the predictions' records did not answer within {ANSWER_WITHIN_S:g} s. Check "
            "AWS_ENDPOINT_URL_S3 and the network"
        ) from None
