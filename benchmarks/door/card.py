"""A runner whose card is a clock: one image at a time, of as long as CARD_SECONDS says, without using a core.

It stands in for a fast card, so that what is measured beside it is the way of a request and not of a picture. All
else is as predict.py does it: a metric for each step, the image's bytes (encoded once) to the bucket with the
product's ImageStore while the next is made, a presigned URL, seed and timings.
"""

from __future__ import annotations

import asyncio
import contextvars
import os
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime

import numpy as np
from cog import BaseRunner, Input, concurrent, streaming
from PIL import Image

from images.encode import encode
from images.store import ImageStore
from s3 import connect
from settings import load_runner_settings

EDGE = 1024
STEPS = 4
CONNECTIONS = 8


class Runner(BaseRunner):
    """Makes the same image for everybody."""

    def setup(self) -> None:
        settings = load_runner_settings()
        self.seconds = float(os.environ["CARD_SECONDS"])
        self.card = ThreadPoolExecutor(1, thread_name_prefix="card")
        self.store = ImageStore(
            connect(settings, connections=CONNECTIONS),
            settings.image_bucket,
            settings.image_prefix,
            settings.image_url_lifetime,
        )
        # Noise on a slope: about as many bytes as a picture of this size has.
        noise = np.random.default_rng(1).normal(0, 6, (EDGE, EDGE, 3))
        slope = np.linspace(30, 220, EDGE)[:, None, None]
        pixels = np.clip(slope + noise, 0, 255).astype(np.uint8)
        self.image = encode(Image.fromarray(pixels), "png", 80, {})

    @streaming
    @concurrent(max=16)
    async def run(
        self,
        prompt: str = Input(description="What the image should show"),
        seed: int | None = Input(description="Is told again", default=None, ge=0),
    ) -> AsyncIterator[str]:
        """Take the card's time, store an image, and yield its URL."""
        del prompt  # nothing paints
        for step in range(1, STEPS + 1):
            progress = {"image": 0, "seed": seed or 0, "step": step, "steps": STEPS}
            self.record_metric("progress", progress)
        await asyncio.get_running_loop().run_in_executor(self.card, time.sleep, self.seconds)
        before = time.perf_counter()
        stored = await asyncio.to_thread(
            self.store.upload, self.image, prediction_id=_id(), index=0, now=datetime.now(UTC)
        )
        yield stored.url
        self.scope.metrics.delete("progress")
        self.record_metric("seed", seed or 0)
        self.record_metric(
            "timings", {"denoise": self.seconds, "upload": time.perf_counter() - before}
        )


def _id() -> str | None:
    """As predict.py finds it."""
    context = contextvars.copy_context()
    return next((context[name] for name in context if name.name == "_coglet_prediction_id"), None)
