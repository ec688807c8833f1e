"""From the settings to an engine ready to generate, and from there to every later version of its model.

The weights are on their way before torch is imported, and everything heavy is imported beside them: READY comes after
the longer of the two, not after their sum.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from compiling import CompiledCode
from diffusion.errors import DiffusionError
from diffusion.recipe import Recipe
from settings import SettingsError
from weights import (
    Bucket,
    LandedTensor,
    ModelStream,
    ObjectChangedError,
    ReadOptions,
    WeightsError,
    open_model,
)
from weights.latest import LatestWatch, ask_once
from weights.manifest import LATEST_NAME
from weights.waterfall import ColdStart

if TYPE_CHECKING:
    import torch

    from diffusion.compiled import Compiling
    from diffusion.engine import Engine
    from diffusion.refresh import Staged
    from settings import RunnerSettings

PROGRESS_SECONDS = 2.0  # between two lines about the weights in the setup log
TIMES_TO_BEGIN = 3  # when the model is replaced while it is read

logger = logging.getLogger("loading")

Result = TypeVar("Result")


def load(
    settings: RunnerSettings,
    cold_start: ColdStart,
    meanwhile: Callable[[], None],
    *,
    compiling: Callable[[Recipe], Compiling] | None = None,
) -> Engine:
    """Stream the weights in, and build the pipeline around them while they arrive.

    `meanwhile` is called once the bytes are on their way, for what else has to be done. A model that is replaced while
    it is read is begun anew, from what is there then. `compiling` says what to compile, rather than the settings and
    the bucket. Raises WeightsError or DiffusionError.
    """
    bucket = None if settings.model_bucket is None else Bucket(settings, settings.model_bucket)
    for attempt in range(1, TIMES_TO_BEGIN + 1):
        try:
            return _load(bucket, settings, cold_start, meanwhile, compiling)
        except ObjectChangedError as error:
            cold_start.give_up()
            if attempt == TIMES_TO_BEGIN:
                raise
            logger.warning("%s. Beginning anew", str(error).removesuffix("."))
        except BaseException:
            cold_start.give_up()
            raise
    raise AssertionError("the last attempt returns or raises")


def on_a_passing_thread(work: Callable[[], Result]) -> Result:
    """Do torch's work beside the engine's on a thread that ends with it.

    OpenMP keeps a pool of workers for every thread that has ever computed something. With two pools a machine of few
    cores has more threads than those, and then workers sleep between any two loops instead of waiting awake: on 2 cores
    a pass of the small model took 45 ms in place of 15. A pool ends with its thread.
    """
    with ThreadPoolExecutor(1, "loading") as thread:
        return thread.submit(work).result()


def _load(
    bucket: Bucket | None,
    settings: RunnerSettings,
    cold_start: ColdStart,
    meanwhile: Callable[[], None],
    compiling: Callable[[Recipe], Compiling] | None,
) -> Engine:
    expects_card = _expects_card(settings)
    options = replace(read_options(settings, to_card=expects_card), folder=settings.model_folder)
    with contextlib.ExitStack() as open_things:
        with cold_start.phase("manifest"):
            stream = open_things.enter_context(
                open_model(
                    bucket,
                    settings.model_path,
                    settings.model_version,
                    options=options,
                    wait_for_destination=expects_card and options.reader != "thread",
                )
            )
        with cold_start.phase("clients", after=("manifest",)):
            meanwhile()
        if stream.snapshot.folder and bucket and settings.model_version is None:
            _compare_beside(bucket, stream, settings)
        engine = _build_engine(stream, bucket, settings, cold_start, open_things, compiling)
        _note_bytes(cold_start, stream, stream.counters())
    if len(settings.model_paths) > 1:
        with cold_start.phase("further models", after=("build",)):
            for model_path in settings.model_paths[1:]:
                _add_model(bucket, model_path, engine, settings)
    return engine


def _add_model(
    bucket: Bucket | None, model_path: str, engine: Engine, settings: RunnerSettings
) -> None:
    """Read one more model into host memory, to take turns with those that are there."""
    begun = time.monotonic()
    engine.add_model(model_path, _staged(bucket, model_path, None, settings))
    logger.info(
        "%s %s waits in host memory, %.1f s",
        model_path,
        engine.version_of(model_path),
        time.monotonic() - begun,
    )


def _staged(
    bucket: Bucket | None, model_path: str, version: str | None, settings: RunnerSettings
) -> Staged:
    """A whole model in host memory, read and checked beside the one that serves."""
    from diffusion.refresh import stage

    with open_model(bucket, model_path, version, options=read_options(settings)) as stream:
        return stage(
            stream.configs(), _reporting_progress(stream), recipe_of(stream), stream.version
        )


def _compare_beside(bucket: Bucket, stream: ModelStream, settings: RunnerSettings) -> None:
    """Say whether the bucket has another version than the folder, on a thread that nobody waits for."""
    served, folder, model_path = stream.version, stream.source, settings.model_path

    def compare() -> None:
        try:
            published = ask_once(bucket, model_path)
        except (WeightsError, SettingsError) as error:
            logger.info(
                "serving version %s from %s, which may not be the published one any more: %s",
                served,
                folder,
                error,
            )
            return
        if published == served:
            return
        if settings.refresh_seconds is not None:
            advice = "MODEL_REFRESH_SECONDS will have it taken over"
        else:
            advice = (
                "Pull it and build the image anew to have that one in it. Until then MODEL_VERSION reads it from the "
                "bucket at the next start, and MODEL_REFRESH_SECONDS takes it over while serving"
            )
        logger.warning(
            "serving version %s from %s, while %s names version %s. %s",
            served,
            folder,
            bucket.url(f"{model_path}/{LATEST_NAME}"),
            published,
            advice,
        )

    threading.Thread(target=compare, name="latest", daemon=True).start()


def read_options(settings: RunnerSettings, *, to_card: bool = False) -> ReadOptions:
    """What the settings say of reading. The ring's size matters where bytes wait in it for a card."""
    chosen: dict[str, Any] = {"ring_bytes": settings.ring_mib * 2**20} if to_card else {}
    return ReadOptions(
        connections=settings.read_connections,
        reader=settings.reader,
        busy=True,  # with imports at the start, with images later
        cache_folder=settings.cache_folder,
        cache_bytes=None if settings.cache_gb is None else int(settings.cache_gb * 1e9),
        **chosen,
    )


def _expects_card(settings: RunnerSettings) -> bool:
    """Whether weights will go to a card, as far as can be told before torch is there to say so."""
    if settings.device == "auto":
        return any(Path(name).exists() for name in ("/dev/nvidiactl", "/dev/dxg"))
    return settings.device == "cuda"


def _build_engine(
    stream: ModelStream,
    bucket: Bucket | None,
    settings: RunnerSettings,
    cold_start: ColdStart,
    open_things: contextlib.ExitStack,
    compiling: Callable[[Recipe], Compiling] | None,
) -> Engine:
    """From bytes on the wire to an engine ready to generate."""
    size = stream.total_bytes / 1e9
    logger.info(
        "loading %s %s, %.2f GB, from %s", settings.model_path, stream.version, size, stream.source
    )
    began = time.monotonic()
    cold_start.begin(
        "bytes",
        stream.started,
        after=("manifest",),
        so_far=lambda: {"bytes": stream.bytes_read, "total_bytes": stream.total_bytes},
        ended=lambda: None if stream.seconds is None else stream.started + stream.seconds,
    )
    cold_start.begin("imports", began, after=("clients",))
    # The heavy imports, seconds of them, while the bytes flow. With torch alone a card can take the first ones.
    from diffusion.device import choose_device, choose_dtype

    device = choose_device(settings.device)
    dtype = choose_dtype(device, settings.dtype)
    if stream.waits_for_destination:
        stream.deliver_to(
            _destination(stream, device, open_things), on_host=_kept_on_host(stream, device)
        )
    from diffusion.build import build_pipeline
    from diffusion.compiled import tally
    from diffusion.engine import Engine

    imported = time.monotonic()
    cold_start.add("imports", began, imported, after=("clients",))
    cold_start.begin("build", imported, after=("imports", "bytes"))
    recipe = recipe_of(stream)
    wanted: Callable[[Recipe], Compiling | None] = compiling or (
        CompiledCode(settings, bucket, stream.version, device, dtype, cold_start).result
    )
    pipeline = build_pipeline(
        stream.configs(),
        _reporting_progress(stream),
        recipe,
        device=device,
        dtype=dtype,
        float8=settings.float8 == "on",
    )
    built = time.monotonic()
    # Building ends with the last tensor, so it waits for the bytes too.
    cold_start.add("build", imported, built, after=("imports", "bytes"))
    to_compile = wanted(recipe)
    engine = Engine(
        pipeline,
        recipe,
        stream.version,
        batch_size=settings.batch_size,
        batch_seconds=settings.batch_wait_ms / 1000,
        float8=settings.float8 == "on",
        name=settings.model_path,
        compiling=to_compile,
    )
    # A card compiles and caches kernels at their first use; on a CPU an image would only delay READY.
    warm_up = 0.0
    if device.type == "cuda" or to_compile is not None:
        with cold_start.phase("warm-up", after=("build", "compiled")) as details:
            warm_up = engine.warm_up()
            if to_compile is not None:
                graphs = tally()
                details.update(graphs_compiled=graphs.made, graphs_found=graphs.found)
                if graphs.found or graphs.made:  # on a card those that are published come later
                    logger.info(
                        "compiled regions: %d graphs from artifacts, %d compiled here",
                        graphs.found,
                        graphs.made,
                    )
    logger.info(
        "ready on %s (%s): weights %.1f s beside imports %.1f s, built after %.1f s, warm-up %.1f s",
        device,
        str(dtype).removeprefix("torch."),
        stream.seconds or 0.0,
        imported - stream.started,
        built - stream.started,
        warm_up,
    )
    return engine


def _destination(
    stream: ModelStream, device: torch.device, open_things: contextlib.ExitStack
) -> Any:
    if device.type != "cuda":
        from weights.memory import HostMemory

        return HostMemory()
    from diffusion.arrival import CardMemory

    memory = open_things.enter_context(CardMemory(device, stream.ring_memory))
    open_things.callback(stream.close)  # first, or pieces would go on to a card that takes no more
    return memory


def _kept_on_host(stream: ModelStream, device: torch.device) -> tuple[str, ...]:
    """The folders whose tensors do not go to the card as they come: the text encoders', where not all of it fits there.

    Whether they stay on the host is decided once the configs have been read (`diffusion.fitting`); by then weights have
    landed, and a card that they fill has nothing left to decide with.
    """
    from diffusion.device import free_bytes, has_room_to_land  # with torch alone

    if device.type != "cuda" or stream.recipe is None:
        return ()
    if has_room_to_land(free_bytes(device), stream.total_bytes):
        return ()
    return tuple(
        tokenizer.encoder for tokenizer in recipe_of(stream).architecture.tokenizers.values()
    )


def recipe_of(stream: ModelStream) -> Recipe:
    """The recipe the model was published with, or what a bare folder's configs say."""
    if stream.recipe is None:
        return Recipe.from_configs(stream.configs())
    return Recipe.model_validate(stream.recipe)


def _note_bytes(cold_start: ColdStart, stream: ModelStream, counters: dict[str, float]) -> None:
    seconds = stream.seconds or 0.0
    cold_start.version = stream.version
    cold_start.add(
        "bytes",
        stream.started,
        stream.started + seconds,
        after=("manifest",),
        bytes=int(counters["landed_bytes"]),
        source=stream.source,
    )
    # Hashing runs within the bytes' time, on as many cores as read: its seconds are the processors'.
    cold_start.add(
        "verification",
        stream.started,
        stream.started + seconds,
        after=("manifest",),
        seconds_of_cpu=round(counters["hash_seconds"], 3),
    )
    for name, value in counters.items():
        if isinstance(value, int):
            cold_start.count(name, value)


def _reporting_progress(stream: ModelStream) -> Iterator[LandedTensor]:
    """The stream's tensors, with a line in the setup log every few seconds."""
    reported = time.monotonic()
    for tensor in stream.tensors():
        yield tensor
        del tensor  # its memory is its consumer's; a name here would keep it while waiting
        now = time.monotonic()
        if now - reported >= PROGRESS_SECONDS:
            reported = now
            read = stream.bytes_read
            rate = read / (now - stream.started)
            left = (stream.total_bytes - read) / rate if rate else 0.0
            logger.info(
                "weights: %.2f of %.2f GB, %.2f GB/s, %.0f s left",
                read / 1e9,
                stream.total_bytes / 1e9,
                rate / 1e9,
                left,
            )


class Refresher:
    """Asks every few seconds whether other versions are published, and has the engine serve them from then on.

    Requests go on meanwhile: the new version is read, verified and checked in host memory, and only its copying into
    the old one's place makes anybody wait. Whatever goes wrong is logged, and the old version goes on serving.
    """

    def __init__(self, settings: RunnerSettings, engine: Engine, seconds: float) -> None:
        self._settings = settings
        self._engine = engine
        self._seconds = seconds
        self._stopped = threading.Event()
        assert settings.model_bucket is not None  # noqa: S101 - the settings see to it
        self._bucket = Bucket(settings, settings.model_bucket)
        self._watches = {path: LatestWatch(self._bucket, path) for path in settings.model_paths}
        self._refused: set[str | None] = set()
        self._thread = threading.Thread(target=self._run, name="refresh", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stopped.wait(self._seconds):
            for model_path in self._watches:
                served = self._engine.version_of(model_path)
                try:
                    on_a_passing_thread(partial(self._refresh, model_path))
                except (WeightsError, DiffusionError) as error:
                    logger.warning("not refreshed, and %s goes on: %s", served, error)
                except Exception:
                    logger.exception("not refreshed, and %s goes on", served)

    def refresh(self) -> bool:
        """Take over what is published now; whether that was another version. Raises WeightsError, DiffusionError."""
        others = [model_path for model_path in self._watches if self._refresh(model_path)]
        return len(others) > 0

    def _refresh(self, model_path: str) -> bool:
        published, served = self._watches[model_path].version(), self._engine.version_of(model_path)
        if published is None or published == served or published in self._refused:
            return False
        logger.info("version %s was published: reading it beside %s", published, served)
        from diffusion.errors import BusyError

        try:
            staged = _staged(self._bucket, model_path, published, self._settings)
            self._engine.replace(staged, name=model_path)
        except BusyError:
            raise  # another time
        except DiffusionError:
            self._refused.add(published)  # it will not fit the next time either
            raise
        return True
