"""A runner of a few lines behind the whole gateway: streams, takes its time, fails and dies when told."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path

from cog import BaseRunner, Input, concurrent, streaming

HELD = Path(__file__).parent / "held"


class Runner(BaseRunner):
    def setup(self) -> None:
        print("setting up")
        if hold := os.environ.get("HOLD_SETUP"):
            while Path(hold).exists():
                time.sleep(0.02)
        # A path fails it for as long as something is there.
        fail = os.environ.get("FAIL_SETUP", "")
        if fail and (not fail.startswith("/") or Path(fail).exists()):
            raise RuntimeError("the bucket refused: try another key")

    @streaming
    @concurrent(max=16)
    async def run(
        self,
        prompt: str = Input(
            description="What to say; `die`, `die once …` and `fail` do as they say"
        ),
        seconds: float = Input(description="How long each output takes", default=0.0, ge=0, le=60),
        seed: int | None = Input(description="Is told again", default=None, ge=0),
        model: str | None = Input(description="Which model to be", default=None),
        num_outputs: int = Input(description="How many to make", default=1, ge=1, le=4),
    ) -> AsyncIterator[str]:
        """Say it."""
        print(f"running {prompt}", flush=True)
        if journal := os.environ.get("JOURNAL"):
            _note(Path(journal), prompt)
        while _is_held(prompt):  # noqa: ASYNC110 - a file tells nobody that it is gone
            await asyncio.sleep(0.02)
        if prompt == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if prompt.startswith("die once"):
            marker = Path(os.environ["MARKERS"]) / str(abs(hash(prompt)))
            if not marker.exists():
                marker.touch()
                os.kill(os.getpid(), signal.SIGKILL)
        if prompt == "fail":
            raise RuntimeError("cannot do that")
        for index in range(int(num_outputs)):
            self.record_metric("progress", {"image": index, "step": 1, "steps": 1})
            await asyncio.sleep(min(seconds, float(os.environ.get("LONGEST_SECONDS", "60"))))
            yield (
                _stored()
                if os.environ.get("STORE_IMAGES")
                else f"https://images.example/{prompt}-{index}.png"
            )
        self.record_metric("seed", seed if seed is not None else 7)
        self.record_metric("timings.denoise", seconds)


def _is_held(prompt: str) -> bool:
    """Whether a test holds it (`gateway_server.holding`)."""
    return any(held.name == prompt for held in HELD.glob("*"))


def _stored() -> str:
    """A real image in the bucket, as small as one can be."""
    from datetime import UTC, datetime

    from PIL import Image

    from images.encode import encode
    from images.store import ImageStore
    from s3 import connect
    from settings import load_runner_settings

    settings = load_runner_settings()
    store = ImageStore(
        connect(settings),
        settings.image_bucket,
        settings.image_prefix,
        public_base_url=settings.public_base_url,
    )
    encoded = encode(Image.new("RGB", (1, 1), "red"), "png", 80, {})
    return store.upload(encoded, prediction_id=None, index=0, now=datetime.now(UTC)).url


def _note(journal: Path, line: str) -> None:
    """What was run, for whoever counts; whole lines, whichever process writes them."""
    with journal.open("a", encoding="utf-8") as lines:
        lines.write(f"{line}\n")
