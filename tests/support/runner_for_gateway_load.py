"""A runner that stores a small image for each prediction, with the product's own store, and keeps a journal of it."""

from __future__ import annotations

import asyncio
import contextvars
import os
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path

from cog import BaseRunner, Input, concurrent, streaming
from PIL import Image

from images.encode import encode
from images.store import ImageStore
from s3 import connect
from settings import load_runner_settings


class Runner(BaseRunner):
    def setup(self) -> None:
        settings = load_runner_settings()
        self.journal = Path(os.environ["JOURNAL"])
        self.store = ImageStore(
            connect(settings, connections=8), settings.image_bucket, settings.image_prefix
        )

    @streaming
    @concurrent(max=16)
    async def run(
        self,
        prompt: str = Input(description="Is told in the image"),
        seconds: float = Input(description="How long it takes", default=0.0, ge=0, le=60),
    ) -> AsyncIterator[str]:
        """Store an image that says its prompt, and yield its URL."""
        prediction_id = _id()
        self._note(prediction_id)
        self.record_metric("progress", {"image": 0, "step": 1, "steps": 1})
        await asyncio.sleep(seconds)
        image = encode(Image.new("RGB", (8, 8)), "png", 80, {"prompt": prompt})
        stored = await asyncio.to_thread(
            self.store.upload, image, prediction_id=prediction_id, index=0, now=datetime.now(UTC)
        )
        yield stored.url

    def _note(self, prediction_id: str) -> None:
        """Which life of the worker has begun it; whole lines, whichever process writes them."""
        with self.journal.open("a", encoding="utf-8") as lines:
            lines.write(f"{prediction_id} {os.getpid()}\n")


def _id() -> str:
    """As predict.py finds it."""
    context = contextvars.copy_context()
    return next(context[name] for name in context if name.name == "_coglet_prediction_id")
