"""Predictions' records for tests that wait: what another gateway, or one that is gone, has in the bucket."""

from __future__ import annotations

import asyncio
import atexit
import functools
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

from demo.s3 import EmbeddedS3, Keypair
from images.records import RecordStore
from s3.async_client import AsyncClient
from settings import StorageSettings, load_storage_settings

TIMEOUT_S = 60.0
_LOOP = asyncio.new_event_loop()
threading.Thread(target=_LOOP.run_forever, name="records", daemon=True).start()

Got = TypeVar("Got")


def storage_of(s3: EmbeddedS3, keys: Keypair | None = None) -> StorageSettings:
    """Where the embedded server is, and whose keys to show it: the administrator's unless given."""
    return load_storage_settings(s3.environment(keys or s3.admin))


class BlockingRecords:
    """A RecordStore whose methods return what they come to, from any thread, several at once too."""

    def __init__(self, storage: StorageSettings, bucket: str, prefix: str = "") -> None:
        self._store = RecordStore(_client(storage), bucket, prefix)
        self.owner = self._store.owner
        self.prefix = self._store.prefix

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._store, name)

        @functools.wraps(method)
        def blocking(*arguments: Any, **named: Any) -> Any:
            returned = method(*arguments, **named)
            return _wait_for(returned) if asyncio.iscoroutine(returned) else returned

        return blocking


@functools.cache
def _client(storage: StorageSettings) -> AsyncClient:
    client = AsyncClient(storage)
    atexit.register(lambda: _wait_for(client.close()))
    return client


def _wait_for(work: Coroutine[Any, Any, Got]) -> Got:
    asked: Future[Got] = asyncio.run_coroutine_threadsafe(work, _LOOP)
    return asked.result(TIMEOUT_S)
