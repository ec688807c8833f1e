"""The durable records of predictions, for the event loop: images/records.py blocks, and works on threads here.

What it raises is the room's own: RecordError and LostLeaseError.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ParamSpec, TypeVar

from images.errors import RecordError
from images.prediction import PredictionRecord
from images.records import Claimed, Existing, Page, RecordStore, Stored
from images.store import ImageStore, ReadImage

# As many as the S3 client has connections; each waits for the network most of its time.
THREADS = 16
# A replica that is gone without a word is noticed this much later; one that lives says so three times meanwhile.
LEASE_S = 30.0
# The client's own limits are for each of its attempts, and begin when there is a thread.
ANSWER_WITHIN_S = 10.0

Given = ParamSpec("Given")
Got = TypeVar("Got")


class Ledger:
    """Records and images of one bucket; `close` when nothing is under way any more."""

    def __init__(self, records: RecordStore, images: ImageStore) -> None:
        self._records = records
        self._images = images
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="ledger")

    async def claim(self, record: PredictionRecord) -> Claimed | Existing:
        return await self._on_thread(self._records.claim, record, LEASE_S)

    async def enter(self, record: PredictionRecord) -> None:
        await self._on_thread(self._records.enter, record)

    async def renew(self, claimed: Claimed, **changes: Any) -> Claimed:
        return await self._on_thread(self._records.renew, claimed, **changes)

    async def finish(self, claimed: Claimed, status: Any, **what: Any) -> PredictionRecord:
        return await self._on_thread(self._records.finish, claimed, status, **what)

    async def get(self, prediction_id: str) -> Stored | None:
        return await self._on_thread(self._records.get, prediction_id)

    async def recent(self, limit: int, before: str | None) -> Page:
        return await self._on_thread(self._records.recent, limit, before)

    async def ask_to_cancel(self, prediction_id: str) -> bool:
        return await self._on_thread(self._records.ask_to_cancel, prediction_id)

    async def webhook_sent(self, prediction_id: str) -> None:
        await self._on_thread(self._records.webhook_sent, prediction_id)

    def with_fresh_urls(self, record: PredictionRecord) -> PredictionRecord:
        """The record with its URLs signed again: those in it end with their time. Signing asks nobody."""
        return record.model_copy(update={"output": self._images.signed_anew(record.output)})

    async def image(self, url: str) -> ReadImage:
        """What a URL in a prediction's output leads to. Raises ImagesError."""
        return await self._on_thread(self._images.read, url)

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _on_thread(
        self, call: Callable[Given, Got], *arguments: Given.args, **named: Given.kwargs
    ) -> Got:
        work = functools.partial(call, *arguments, **named)
        asked = asyncio.get_running_loop().run_in_executor(self._threads, work)
        try:
            async with asyncio.timeout(ANSWER_WITHIN_S):
                return await asked
        except TimeoutError:
            raise RecordError(
                f"the bucket of the predictions' records did not answer within {ANSWER_WITHIN_S:g} s. Check "
                "AWS_ENDPOINT_URL_S3 and the network"
            ) from None
