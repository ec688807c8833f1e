"""What a caller who reads the event stream hears of a prediction: its steps, and each image once it is stored.

Cog has one kind of event for that: a metric that is recorded. Those recorded here are taken back at the end, since the
`metrics` of a prediction that is over are about what it took.
"""

from __future__ import annotations

import asyncio
import contextvars
import threading
from typing import TYPE_CHECKING

from images.preview import data_uri

if TYPE_CHECKING:
    from cog import BaseRunner

    from diffusion.watching import Step

Value = dict[str, str | int]


class Events:
    """The events of one prediction; to be made and used on its event loop, but for `watch`.

    Args:
        over: set when nothing is to be told any more.
    """

    def __init__(self, runner: BaseRunner, over: threading.Event) -> None:
        self._runner = runner
        self._over = over
        self._loop = asyncio.get_running_loop()
        self._context = contextvars.copy_context()  # by which Cog knows whose metric it is
        self._seeds: list[int] = []
        self._recorded: set[str] = set()

    def watch(self, step: Step) -> None:
        """To be called on the thread that denoises, which goes on at once: its picture is encoded on the loop."""
        self._loop.call_soon_threadsafe(self._progress, step, context=self._context)

    def stored(self, image: int, seed: int, url: str) -> None:
        """Cog 0.23 holds back what an async runner yields until its last: here it is heard of at once."""
        self._record("stored", {"image": image, "seed": seed, "url": url})

    def end(self) -> None:
        """Take back what was recorded."""
        for name in sorted(self._recorded):
            self._runner.scope.metrics.delete(name)
        self._recorded.clear()

    def _progress(self, step: Step) -> None:
        if self._over.is_set():
            return
        if step.seed not in self._seeds:
            self._seeds.append(step.seed)
        progress: Value = {
            "image": self._seeds.index(step.seed),
            "seed": step.seed,
            "step": step.step,
            "steps": step.steps,
        }
        if step.preview is not None:
            progress["preview"] = data_uri(step.preview)
        self._record("progress", progress)

    def _record(self, name: str, value: Value) -> None:
        self._runner.record_metric(name, value)
        self._recorded.add(name)
