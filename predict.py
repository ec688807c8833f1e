"""The Cog Runner: what a caller may ask for, and the way of a request through the rooms.

Everything is known here by name and nothing in detail: bytes are `weights/`, tensors `diffusion/`, files and URLs
`images/`. Only light modules are imported at the top, so that the weights are on their way before torch is.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import aclosing, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from cog import BaseRunner, Input, concurrent, streaming

from diffusion.errors import DiffusionError
from diffusion.request import GenerationRequest
from diffusion.sizes import size_for
from events import Events
from images.encode import encode
from images.errors import ImagesError
from images.provenance import Provenance
from images.store import ImageStore
from loading import Refresher, load
from s3 import connect
from settings import RunnerSettings, SettingsError, load_runner_settings
from weights import WeightsError
from weights.waterfall import ColdStart

if TYPE_CHECKING:
    from concurrent.futures import Future

    from diffusion.engine import Engine, GeneratedImage

ASPECT_RATIOS = ["1:1", "16:9", "21:9", "3:2", "2:3", "4:5", "5:4", "3:4", "4:3", "9:16", "9:21"]
OUTPUT_FORMATS = ["png", "webp", "jpg"]

UPLOAD_CONNECTIONS = 8

# Their messages stand alone: they say what was being done, to which object, and what to try.
EXPECTED_ERRORS = (SettingsError, WeightsError, DiffusionError, ImagesError)

logger = logging.getLogger("predict")


class Runner(BaseRunner):
    """Serves one model from one bucket, and puts the images into another."""

    settings: RunnerSettings
    engine: Engine
    store: ImageStore
    cold_start: ColdStart

    def setup(self) -> None:
        """Stream the weights in, and build the pipeline around them while they arrive.

        Raises SettingsError, WeightsError or DiffusionError, whose message Cog shows under /health-check.
        """
        _log_to_standard_error()
        with _unexpected_errors_logged("setup"):
            self.cold_start = ColdStart()
            self.settings = load_runner_settings()
            self.cold_start.model = self.settings.model_path
            folder = self.settings.cold_start_folder
            with nullcontext() if folder is None else self.cold_start.written_to(folder):
                self.engine = load(self.settings, self.cold_start, meanwhile=self._connect_store)
                self.cold_start.ready()
            if self.settings.refresh_seconds is not None:
                Refresher(self.settings, self.engine, self.settings.refresh_seconds).start()

    def _connect_store(self) -> None:
        self.store = ImageStore(
            connect(self.settings, connections=UPLOAD_CONNECTIONS),
            self.settings.image_bucket,
            self.settings.image_prefix,
            self.settings.image_url_lifetime,
            self.settings.public_base_url,
        )

    # They wait in the engine's line, where they are put into passes together, and are encoded and uploaded side by side.
    @streaming
    @concurrent(max=16)
    async def run(
        self,
        prompt: str = Input(description="What the image should show, in up to 10,000 characters"),
        negative_prompt: str = Input(
            description="What to keep out of it; models distilled without guidance (SDXL-Lightning) ignore it",
            default="",
        ),
        aspect_ratio: str = Input(
            description="Width to height. 1:1 is 1024x1024 for SDXL; the others have about the same area",
            choices=ASPECT_RATIOS,
            default="1:1",
        ),
        guidance_scale: float | None = Input(
            description="How closely to follow the prompt; models distilled without guidance (SDXL-Lightning) ignore it",
            ge=0,
            le=50,
            default=None,
        ),
        num_inference_steps: int | None = Input(
            description="Denoising steps; a distilled model does only the counts it was made for (SDXL-Lightning: 4)",
            ge=1,
            le=50,
            default=None,
        ),
        max_sequence_length: int = Input(
            description="Accepted for compatibility and ignored: SDXL reads up to 600 tokens of a prompt, whatever this says",
            ge=1,
            le=512,
            default=512,
        ),
        seed: int | None = Input(
            description="Gives the same image again; random by default. Image k of a request uses seed + k",
            ge=0,
            le=9223372036854775807,
            default=None,
        ),
        output_format: str = Input(
            description="The images' file format", choices=OUTPUT_FORMATS, default="png"
        ),
        output_quality: int = Input(
            description="From 0 to 100, for webp and jpg; png keeps every pixel and ignores it",
            ge=0,
            le=100,
            default=80,
        ),
        num_outputs: int = Input(description="How many images to make", ge=1, le=4, default=1),
        prompt_weighting: bool = Input(
            description="Read (red fox)1.3 and red++ in both prompts as more of it, (red fox)0.7 and red-- as less; otherwise every character is plain",
            default=False,
        ),
        previews: bool = Input(
            description="Put a small picture into the event of each step, for callers who read the event stream",
            default=False,
        ),
        model: str | None = Input(
            description="Which of the models this server has, by its MODEL_PATH; the first by default",
            default=None,
        ),
    ) -> AsyncIterator[str]:
        """Generate images and yield their URLs, in the order of their seeds."""
        with _unexpected_errors_logged("a prediction"):
            del max_sequence_length  # accepted, and of no effect
            native_size = self.engine.recipe_of(model).native_size
            width, height = size_for(aspect_ratio, native_size)
            request = GenerationRequest(
                prompt=prompt,
                negative_prompt=negative_prompt,
                width=width,
                height=height,
                steps=_whole(num_inference_steps),
                guidance_scale=guidance_scale,
                seed=_whole(seed),
                num_outputs=int(num_outputs),
                prompt_weighting=prompt_weighting,
                model=model,
            )
            answer = self._answer(request, output_format, int(output_quality), previews)
            async with aclosing(answer) as urls:
                async for url in urls:
                    yield url

    async def _answer(
        self, request: GenerationRequest, output_format: str, output_quality: int, previews: bool
    ) -> AsyncGenerator[str]:
        """Encode and upload each image as it comes out of the engine, beside the steps of the next.

        A URL goes out as soon as its image is stored and those before it are.
        """
        prediction_id = _prediction_id()
        over = threading.Event()
        events = Events(self, over)
        generation = self.engine.submit(request, watch=events.watch, previews=previews)
        timings: dict[str, float] = {}

        async def finish(index: int, coming: Future[GeneratedImage]) -> _Finished:
            image = await asyncio.wrap_future(coming)
            _add(timings, image.timings)
            return await asyncio.to_thread(
                self._finish, image, request, output_format, output_quality, prediction_id, index
            )

        finishing = [
            asyncio.create_task(finish(index, coming))
            for index, coming in enumerate(generation.images)
        ]
        finished: list[_Finished] = []
        failures: list[Exception] = []
        try:
            # All of them, also when one fails: what was generated is stored if it can be.
            for task in finishing:
                try:
                    done = await task
                except Exception as failure:  # noqa: BLE001 - raised below, with what was stored
                    failures.append(failure)
                    continue
                finished.append(done)
                events.stored(done.index, done.seed, done.url)
                _add(timings, done.timings)
                if not failures:
                    yield done.url
            if failures:
                # What the model could not do says more than what became of the images before.
                failures.sort(key=lambda failure: not isinstance(failure, DiffusionError))
                raise _with_what_was_stored(failures[0], [done.url for done in finished])
            self.record_metric("seed", finished[0].seed)
            self.record_metric("model_version", finished[0].version)
            for stage, seconds_spent in timings.items():
                self.record_metric(f"timings.{stage}", round(seconds_spent, 4))
        finally:
            over.set()
            generation.cancel()
            for task in finishing:
                task.cancel()
            events.end()

    def _finish(
        self,
        image: GeneratedImage,
        request: GenerationRequest,
        output_format: str,
        output_quality: int,
        prediction_id: str | None,
        index: int,
    ) -> _Finished:
        """Encode and upload one image, on a thread."""
        started = time.perf_counter()
        provenance = Provenance(
            prompt=request.prompt,
            negative_prompt=request.negative_prompt,
            seed=image.seed,
            steps=image.steps,
            guidance_scale=image.guidance_scale,
            width=request.width,
            height=request.height,
            model=request.model or self.settings.model_path,
            version=image.version or "",
            prompt_weighting=request.prompt_weighting,
        )
        encoded = encode(image.image, output_format, output_quality, provenance.as_text())
        encoded_at = time.perf_counter()
        try:
            stored = self.store.upload(
                encoded, prediction_id=prediction_id, index=index, now=datetime.now(UTC)
            )
        except ImagesError as error:
            raise ImagesError(f"{error}. To make it again, send seed {image.seed}") from error
        done = time.perf_counter()
        seconds = {"encode": encoded_at - started, "upload": done - encoded_at}
        return _Finished(index, image.seed, image.version, stored.url, seconds)


@dataclass(frozen=True)
class _Finished:
    """An image that is stored, and the seconds that took."""

    index: int
    seed: int
    version: str | None
    url: str
    timings: dict[str, float]


def _with_what_was_stored(failure: BaseException, urls: list[str]) -> BaseException:
    """The failure of one image, with the URLs of those that did arrive: they are paid for, and nobody else knows."""
    if not urls or not isinstance(failure, ImagesError | DiffusionError):
        return failure
    # A DiffusionError ends the request, so the images after it were never made.
    which = "other images" if isinstance(failure, ImagesError) else "images before it"
    message = str(failure).removesuffix(".")
    return type(failure)(f"{message}. The {which} are stored: {' '.join(urls)}")


def _prediction_id() -> str | None:
    """The id this prediction was asked for under. Cog 0.23 keeps it in a context variable and has no API for it."""
    context = contextvars.copy_context()
    return next((context[name] for name in context if name.name == "_coglet_prediction_id"), None)


def _whole(number: float | None) -> int | None:
    """Cog's server lets 4.0 pass for an integer, as JSON Schema does, and hands it on as a float."""
    return None if number is None else int(number)


def _add(total: dict[str, float], seconds: dict[str, float]) -> None:
    for stage, spent in seconds.items():
        total[stage] = total.get(stage, 0.0) + spent


@contextmanager
def _unexpected_errors_logged(doing: str) -> Iterator[None]:
    """Cog shows an error's message alone, which is not enough for one that nobody wrote."""
    try:
        yield
    except EXPECTED_ERRORS:
        raise
    except Exception:
        logger.exception("unexpected error in %s", doing)
        raise


def _log_to_standard_error() -> None:
    logging.basicConfig(format="%(message)s")
    for room in ("predict", "loading", "weights", "diffusion", "images"):
        logging.getLogger(room).setLevel(logging.INFO)
