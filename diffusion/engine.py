"""The way in: a request is checked, gets its place in the line, and its images come out, as futures or one by one.

The parts and their arithmetic are stock diffusers', so the pixels are too. Encoding images into files is not done here.
"""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future
from functools import partial
from threading import Event

from diffusers import DiffusionPipeline
from PIL import Image

from diffusion.company import Company
from diffusion.compiled import Compiling
from diffusion.denoising import is_guided
from diffusion.device_loop import DeviceLoop
from diffusion.errors import RequestError
from diffusion.graphs import Graphs
from diffusion.line import Job
from diffusion.model import Model
from diffusion.readiness import Readiness
from diffusion.recipe import Recipe
from diffusion.refresh import Staged, one_refresh_at_a_time, take_over
from diffusion.request import GenerationRequest
from diffusion.shelf import OnShelf, Shelf
from diffusion.speed import Speed
from diffusion.under_way import GeneratedImage, Wish
from diffusion.watching import Watch

logger = logging.getLogger(__name__)

__all__ = ["Engine", "GeneratedImage", "Generation", "GenerationRequest"]

# More than these would only make the first of them wait longer for its picture.
MOST_TOGETHER_ON_CPU = 8


class Generation:
    """A request in the line: `images` are futures, one for each image, in the order of their seeds."""

    def __init__(self, engine: Engine, loop: DeviceLoop, job: Job[Wish]) -> None:
        self._engine = engine  # whose loop ends with it
        self._loop = loop
        self._job = job

    @property
    def images(self) -> tuple[Future[GeneratedImage], ...]:
        return self._job.images

    def cancel(self) -> None:
        """Leave the line, or the device after the step it is in. Futures that are open are cancelled."""
        self._loop.cancel(self._job)


class Engine:
    """Generates images on one device, for any number of threads, first come, first served.

    Args:
        version: names the model that the pipeline was built from; whatever name is given, every image carries it.
        name: what requests call this model, where there is more than one (`add_model`).
        batch_size: how many images may share the denoiser's passes. On a CPU, where that is 8 by default, images are
            the same in company as alone, bit for bit. A card's kernels differ in their last bits, so there it is 1
            by default.
        batch_seconds: how long a request waits for others to share its passes when the device is free.
        float8: compute large linear layers in 8-bit floats where the card can and the images bear it (`warm_up` tries).
        compiling: what `warm_up` is to have compiled. On a CPU each image then has its own passes, since compiled code
            has other last bits than what images share.
    """

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        recipe: Recipe,
        version: str | None = None,
        *,
        batch_size: int | None = None,
        batch_seconds: float = 0.0,
        float8: bool = False,
        name: str = "",
        compiling: Compiling | None = None,
    ) -> None:
        model = Model(pipeline, recipe, version, name)
        self._device, self._dtype = model.device, model.dtype
        on_cpu = self._device.type == "cpu"
        most = batch_size or (MOST_TOGETHER_ON_CPU if on_cpu else 1)
        if on_cpu and compiling is not None:
            most = 1
        self._most = most
        self._compiling = compiling or Compiling(frozenset(), only_from_artifacts=True)
        self._graphs = Graphs(self._device)
        self._speed = Speed(
            self._device,
            float8=float8,
            compiling=compiling,
            forget_graphs=self._graphs.forget,
        )
        self._weights_changed(model)()
        self._loop = DeviceLoop(
            model,
            Company(most, exact=on_cpu),
            batch_seconds,
            self._weights_changed(model),
            self._graphs,
            self._speed.forget_graphs,
        )
        self._readiness = Readiness(self._loop, self._speed, self._compiling, most, self._device)
        weakref.finalize(self, _stop, self._readiness, self._loop)

    @property
    def models(self) -> tuple[str, ...]:
        """What requests can name; the first serves those that name none."""
        return tuple(self._loop.models)

    @property
    def recipe(self) -> Recipe:
        return self.recipe_of(None)

    def recipe_of(self, name: str | None) -> Recipe:
        """Raises `RequestError` for a model that is not there."""
        return self._model(name).recipe

    @property
    def version(self) -> str | None:
        """The version of the first model that serves now. A `GeneratedImage` says which one made it."""
        return self.version_of(None)

    def version_of(self, name: str | None) -> str | None:
        """The version of a model that serves now. Raises `RequestError` for one that is not there."""
        return self._model(name).version

    @property
    def _pipeline(self) -> DiffusionPipeline:
        pipeline: DiffusionPipeline = self._model(None).pipeline
        return pipeline

    def _model(self, name: str | None) -> Model:
        models = self._loop.models
        wanted = self._loop.default if name is None else name
        if wanted not in models:
            raise RequestError(
                f"model is {name!r}; this server has {', '.join(map(repr, models))}."
            )
        return models[wanted]

    def submit(
        self,
        request: GenerationRequest,
        cancelled: Event | None = None,
        watch: Watch | None = None,
        *,
        previews: bool = False,
    ) -> Generation:
        """Put a request in the line. Raises `RequestError` for what this checkpoint cannot do.

        Args:
            watch: called after each denoising step of each image, on the device's thread, which waits for it.
            previews: whether `watch` gets a small picture each time. It costs a little, and no pixel of the image.

        A future ends with `OutOfMemoryError` or `NonFiniteError` when the device cannot, and with `RequestError` when
        another version has taken over before the first image, and cannot do it. Other requests are served all the same.
        Once its first image has begun, all of a request's images are made by the same version.
        """
        model = self._model(request.model)
        wish = Wish(request, model.plan(request), model, watch, previews)
        return self._submit(wish, cancelled or Event())

    def _submit(self, wish: Wish, cancelled: Event) -> Generation:
        plan = wish.plan
        job = Job(
            (wish.model.name, plan.width, plan.height, is_guided(wish.model.denoiser, plan)),
            tuple(Future() for _ in plan.seeds),
            cancelled,
            wish,
        )
        self._loop.add(job)
        return Generation(self, self._loop, job)

    def generate(
        self,
        request: GenerationRequest,
        cancelled: Event | None = None,
        watch: Watch | None = None,
        *,
        previews: bool = False,
    ) -> Iterator[GeneratedImage]:
        """The request's images, one by one. The request is checked at once, and put in the line with the first `next`.

        Args:
            cancelled: set it, from any thread, when nobody waits for the images any more. The iterator then ends
                without a further image: at once when its turn comes, or after the denoising step it is in.
            watch, previews: as for `submit`.

        Errors are those of `submit`. Dropping or closing the iterator cancels what it has not handed out.
        """
        model = self._model(request.model)
        wish = Wish(request, model.plan(request), model, watch, previews)
        return self._images(wish, cancelled or Event())

    def _images(self, wish: Wish, cancelled: Event) -> Iterator[GeneratedImage]:
        generation = self._submit(wish, cancelled)
        try:
            for image in generation.images:
                try:
                    made = image.result()
                except CancelledError:
                    return
                if cancelled.is_set():
                    return
                yield made
        finally:
            generation.cancel()

    def _serve(self, model: Model) -> None:
        """From now on, in the place of the only one there is."""
        old = self._loop.models[model.name]
        self._loop.models[model.name] = model
        self._loop.shelf = Shelf(model, self._weights_changed(model))
        self._weights_changed(model)()
        replaced = model.denoiser is not old.denoiser
        if replaced:
            # Its tensors lie elsewhere: graphs would go on reading those of the one before, and keep them.
            self._graphs.forget()
        if replaced or model.pipeline.vae is not old.pipeline.vae:
            self._readiness.begin_again()

    def _weights_changed(self, model: Model) -> Callable[[], None]:
        return partial(self._speed.prepare, model.denoiser, model.pipeline.vae, model.text_encoders)

    def add_model(self, name: str, staged: Staged) -> None:
        """Serve another model too, in turns with those that are there, from host memory.

        Raises `ModelError` when its parts are not built like theirs.
        """
        with one_refresh_at_a_time:
            held = self._loop.shelf.hold(name, staged)
            with self._loop.paused(patience=600.0):
                self._put(held)

    def _put(self, held: OnShelf) -> None:
        self._loop.shelf.put(held)
        self._loop.models[held.model.name] = held.model

    def replace(self, staged: Staged, *, name: str | None = None, patience: float = 600.0) -> float:
        """Serve another version from now on; returns the seconds for which new requests had to wait.

        Requests under way end with the version they began with, and those that come meanwhile wait for the new one.
        Where shapes stay the same its tensors lie where the old ones lay (see `take_over`).

        Args:
            name: the model that it is a version of; the first by default.

        Raises `BusyError` when requests under way are not done after `patience` seconds, and `ModelError` when the
        device has no room for a part that changed, or models that share modules would differ in them. The old version
        then goes on serving.
        """
        with one_refresh_at_a_time:
            old = self._model(name)
            # All that can be done beside the requests is.
            shared = self._loop.shelf.shared
            held = self._loop.shelf.hold(old.name, staged) if shared else None
            closed = time.perf_counter()
            with self._loop.paused(patience):
                begun = time.perf_counter()
                if held is not None:
                    self._put(held)
                else:
                    take_over(staged, old.pipeline, device=self._device, dtype=self._dtype)
                    self._serve(Model(staged.pipeline, staged.recipe, staged.version, old.name))
                done = time.perf_counter()
        logger.info(
            "Version %s took over from %s in %.2f s, after %.2f s for the requests under way.",
            staged.version,
            old.version,
            done - begun,
            begun - closed,
        )
        return done - closed

    def warm_up(self) -> float:
        """Have the native size ready, so that no caller pays for its first use; returns the seconds that took.

        Whatever is to be compiled here is compiled before it returns, batch by batch: requests never wait for that. On
        a card the other sizes, and batches, are made ready later, whenever there is no request (`getting_ready`); on a
        CPU those are that run compiled. Code out of artifacts takes over on a card as soon as it has been read, which
        is done on a thread of its own.
        """
        started = time.perf_counter()
        self._generate_one()
        if self._device.type == "cuda":
            default_steps = self.recipe.default_steps
            self._speed.try_float8(partial(self._generate_one, default_steps))
        self._readiness.begin()
        return time.perf_counter() - started

    @property
    def getting_ready(self) -> tuple[Future[None], ...]:
        """What `warm_up` has left for later, and is not done yet: one for each size and batch."""
        return self._readiness.getting_ready

    @property
    def compiled(self) -> frozenset[tuple[int, int]]:
        """Those of the sizes to be compiled that run so by now, in every batch."""
        return self._readiness.compiled

    def _generate_one(self, steps: int | None = None) -> Image.Image:
        recipe = self.recipe
        request = GenerationRequest(
            prompt="warm-up",
            width=recipe.native_size,
            height=recipe.native_size,
            # One step runs every kernel there is, where the checkpoint can do one.
            steps=steps or (1 if recipe.steps is None else min(recipe.steps)),
            seed=0,
        )
        (made,) = self.generate(request)
        return made.image


def _stop(readiness: Readiness, loop: DeviceLoop) -> None:
    # The loop first: what the other waits for is cancelled then.
    loop.stop()
    readiness.stop()
