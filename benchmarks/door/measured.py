"""What one PUT of a record costs on the bucket that is measured with."""

from __future__ import annotations

import asyncio
import time
from datetime import UTC, datetime

from benchmarks.door.servers import IMAGES, KEY
from images.prediction import PredictionRecord
from images.records import RecordStore
from s3.async_client import AsyncClient
from settings import StorageSettings

WARM_UPS = 20
PUTS = 200


def put_seconds(port: int) -> list[float]:
    """Of claims as the gateway writes them, each one PUT, one after the other."""
    storage = StorageSettings.model_validate(
        {
            "AWS_ENDPOINT_URL_S3": f"http://127.0.0.1:{port}",
            "AWS_REGION": "auto",
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": KEY,
        }
    )
    return asyncio.run(_measured(storage))


async def _measured(storage: StorageSettings) -> list[float]:
    found: list[float] = []
    async with AsyncClient(storage) as client:
        records = RecordStore(client, IMAGES, "put")
        for number in range(WARM_UPS + PUTS):
            record = PredictionRecord.of(
                f"put-{number}", {"prompt": "a lighthouse"}, created_at=datetime.now(UTC)
            )
            started = time.perf_counter()
            await records.claim(record)
            found.append(time.perf_counter() - started)
    return found[WARM_UPS:]
