"""One way in a process of its own: `python -m benchmarks.generation.run_one WAY JOB`.

It says when it is ready, and then answers lines of JSON with lines of JSON until its input ends. What is asked, and in
which order, is its parent's business.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import IO, Any

from benchmarks.generation.model import Job
from benchmarks.generation.ways import WAYS, Generate, Made, NotHereError, Ours
from benchmarks.wire.memory import own, reset_peak

QUALITY = 80  # PNG ignores it
SECOND = "another"


class Answers:
    """What one way answers."""

    def __init__(self, generate: Generate, device: str) -> None:
        self._generate = generate
        self._on_card = device == "cuda"

    def one(
        self,
        prompt: str,
        seed: int,
        size: int,
        save: str | None = None,
        encode: list[int] | None = None,
    ) -> dict[str, Any]:
        """One image from call to picture. `encode` are edges: what a PNG of the picture at that edge takes is noted."""
        started = time.perf_counter()
        made = self._generate(prompt, seed, size)
        seconds = time.perf_counter() - started
        finished = time.monotonic()
        if save is not None:
            made.image.save(save)
        return {
            "seconds": seconds,
            "finished": finished,
            "device_seconds": made.device_seconds,
            "timings": dict(made.timings),
            "encode": {str(edge): _encoding(made.image, edge) for edge in encode or ()},
        }

    def many(self, size: int, concurrency: int, images: int, seed: int) -> dict[str, Any]:
        """As many images by as many callers, each encoded by its caller and dropped.

        A lone caller is this thread, as in `one`: in another, torch has a second team of threads, and on a busy machine
        libgomp's teams wait in another way as soon as there are two.
        """

        def make(number: int) -> float:
            made: Made = self._generate(f"a castle by the sea, number {number}", number, size)
            _encoded(made.image)
            return made.device_seconds or 0.0

        with ThreadPoolExecutor(concurrency) as threads:
            started = time.perf_counter()
            numbers = range(seed, seed + images)
            spent = list(threads.map(make, numbers) if concurrency > 1 else map(make, numbers))
            seconds = time.perf_counter() - started
        return {"seconds": seconds, "device_seconds": sum(spent)}

    def settle(self) -> dict[str, Any]:
        """Return once it does nothing but wait for requests."""
        if isinstance(self._generate, Ours):
            self._generate.settle()
        return {}

    def compiled(self, size: int) -> dict[str, Any]:
        """The sizes that run compiled, how many graphs were made here for that, or found, and since when they are used.

        Waits for `size` to be among them, as long as anything is made ready.
        """
        from diffusion.compiled import tally

        assert isinstance(self._generate, Ours)  # noqa: S101 - its parent asks no other
        since = self._generate.await_compiled(size)
        return {"sizes": self._generate.compiled(), "since": since, **asdict(tally())}

    def add_second(self) -> dict[str, Any]:
        """Serve a second model from now on."""
        assert isinstance(self._generate, Ours)  # noqa: S101 - its parent asks no other
        self._generate.add_second_model(SECOND)
        return {}

    def switch(self, size: int, rounds: int) -> dict[str, Any]:
        """Seconds of a request for the model that was used last, and of one for the second, taken in turns."""
        assert isinstance(self._generate, Ours)  # noqa: S101 - its parent asks no other
        found: dict[str, list[float]] = {"same": [], "other": []}
        for number in range(2 * (rounds + 1)):
            for kind in ("other", "same"):
                started = time.perf_counter()
                # Even turns go to the second model, odd ones back to the first.
                model = None if number % 2 else SECOND
                self._generate(f"a harbour, {kind} {number}", number, size, model)
                if number > 1:
                    found[kind].append(time.perf_counter() - started)
        return found

    def memory(self) -> dict[str, Any]:
        """The most there was since the last time somebody asked, in bytes."""
        found: dict[str, Any] = {"host": own("VmHWM")}
        reset_peak()
        if self._on_card:
            import torch

            found["card"] = torch.cuda.max_memory_reserved()
            found["card_used"] = torch.cuda.max_memory_allocated()
            found["card_now"] = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        return found


def _encoding(image: Any, edge: int) -> float:
    from PIL import Image

    if image.width != edge:
        image = image.resize((edge, edge), Image.Resampling.LANCZOS)
    started = time.perf_counter()
    _encoded(image)
    return time.perf_counter() - started


def _encoded(image: Any) -> None:
    from images.encode import encode

    encode(image, "png", QUALITY, {})


def main() -> None:
    name, job_text = sys.argv[1:]
    job = Job.load(job_text)
    # Libraries print what they like; the lines of JSON keep a way out of their own.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    try:
        generate = WAYS[name].prepare(job)
    except (ImportError, NotHereError) as reason:
        _say(answers, skipped=str(reason))
        return
    answering = Answers(generate, job.device)
    _say(answers, finished=time.monotonic())
    for line in sys.stdin:
        asked = json.loads(line)
        answer: Callable[..., dict[str, Any]] = getattr(answering, asked.pop("ask"))
        _say(answers, **answer(**asked))
    os._exit(0)  # nobody waits for gigabytes to be given back one object at a time


def _say(answers: IO[str], **fields: Any) -> None:
    print(json.dumps(fields), file=answers, flush=True)


if __name__ == "__main__":
    main()
