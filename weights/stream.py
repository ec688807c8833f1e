"""A model on its way from the bucket into memory: tensors come out, verified, in the order they land.

Every tensor gets memory of its own before its bytes arrive, and is handed over once all its chunks have been verified.
The stream keeps no reference to what it has handed over. Reading goes on in threads here or in a child process, which
is decided by where it is disturbed least.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from weights.bucket import Bucket
from weights.cache import NodeCache
from weights.chunks import SnapshotFile
from weights.counters import Counters
from weights.errors import FolderError, WeightsError
from weights.fetch import Fetcher
from weights.landing import LandedTensor, Landings, WeightFile, WholeFile
from weights.memory import Destination, HostMemory
from weights.model_folder import ModelFolder, no_bucket_beside
from weights.options import ReadOptions
from weights.pace import LIMIT, Pace, first_connections
from weights.pulled import pulled_snapshot
from weights.reading_process import ReadingProcess
from weights.safetensors_layout import header_length
from weights.snapshot import Snapshot, find_snapshot

if TYPE_CHECKING:
    from weights.objects import ObjectReader

logger = logging.getLogger(__name__)


def open_model(
    bucket: Bucket | None,
    model_path: str,
    version: str | None = None,
    *,
    options: ReadOptions | None = None,
    wait_for_destination: bool = False,
) -> ModelStream:
    """Find the model (raising what `find_snapshot` raises) and start reading it at once.

    Where `options.folder` holds it, it is read from there, whatever the bucket has by now; where it does not, the log
    says why. Raises FolderError where it does not and there is no bucket.
    """
    options = options or ReadOptions()
    snapshot = _in_folder(bucket, model_path, version, options.folder)
    # Before anything is asked: the child imports while the manifest is on its way.
    process = (
        ReadingProcess(options.ring_bytes)
        if _in_a_process(None if snapshot else bucket, options, wait_for_destination)
        else None
    )
    try:
        if snapshot is None:
            assert bucket is not None  # noqa: S101 - else `_in_folder` has raised
            snapshot = find_snapshot(bucket, model_path, version)
        return ModelStream(
            bucket,
            snapshot,
            options=options,
            process=process,
            wait_for_destination=wait_for_destination,
        )
    except BaseException:
        if process is not None:
            process.stop(wait=False)
        raise


def _in_folder(
    bucket: Bucket | None, model_path: str, version: str | None, folder: Path | None
) -> Snapshot | None:
    if folder is None and bucket is not None:
        return None
    try:
        if folder is None:
            raise FolderError("no folder is named")
        return pulled_snapshot(folder, model_path, version)
    except FolderError as error:
        if bucket is None:
            raise FolderError(
                f"there is nowhere to read {model_path} from: {str(error).removesuffix('.')}, and no bucket is named "
                "either (MODEL_BUCKET_NAME)"
            ) from error
        logger.warning("reading %s, since %s", bucket.url(model_path), error)
        return None


def _in_a_process(bucket: Bucket | None, options: ReadOptions, wait_for_destination: bool) -> bool:
    """A child where it pays: over TLS beside other work, and where bytes have to wait in a ring for a card's memory.

    From a folder (`bucket` is None) a system call fills megabytes without the interpreter, as from a plain connection.
    """
    if options.reader == "auto":
        return wait_for_destination or (
            bucket is not None and bucket.reader.secure and options.busy
        )
    return options.reader == "process"


class ModelStream:
    """One model being read. A context manager; leaving it stops the reading.

    `configs()` gives the small files and `tensors()` the weights. Both raise what went wrong while reading.
    With `wait_for_destination`, bytes gather in the ring until `deliver_to` says where tensors are to lie. A snapshot
    that lies in a folder needs no bucket while that is undamaged.
    """

    def __init__(
        self,
        bucket: Bucket | None,
        snapshot: Snapshot,
        *,
        options: ReadOptions | None = None,
        process: ReadingProcess | None = None,
        wait_for_destination: bool = False,
    ) -> None:
        options = options or ReadOptions()
        self.snapshot = snapshot
        self.started = time.monotonic()
        self.seconds: float | None = None  # from the start to the last verified byte
        self._bucket = bucket
        self._landed: queue.SimpleQueue[LandedTensor | None] = queue.SimpleQueue()
        self._error: BaseException | None = None
        self._closed = False
        self._lock = threading.Lock()
        self._files = _in_reading_order(snapshot)
        for file in self._files:
            if file.is_weights and not file.size:
                header_length(b"", self._place(file), 0)  # raises: there is no such thing
        self._configs = {file.path: WholeFile(file) for file in self._files if file.is_config}
        self.total_bytes = sum(file.size for file in self._files)
        self._process = process
        self._waits = process is not None and wait_for_destination
        self._fetcher: Fetcher | None = None
        if process is not None:
            process.order(bucket, self._files, options, snapshot.folder)
            if not wait_for_destination:
                self.deliver_to(HostMemory())
        else:
            self._read_in_threads(options)

    @property
    def version(self) -> str:
        return self.snapshot.version

    @property
    def recipe(self) -> Mapping[str, Any] | None:
        """The recipe the model was published with; None for a bare folder."""
        return self.snapshot.recipe

    @property
    def source(self) -> str:
        """Where the bytes come from, for people: a folder on this disk, or s3://bucket/model."""
        folder, model_path = self.snapshot.folder, self.snapshot.model_path
        if folder is None and self._bucket is not None:
            return self._bucket.url(model_path)
        return str(folder)

    @property
    def bytes_read(self) -> int:
        """Verified bytes so far."""
        return int(self.counters()["landed_bytes"])

    @property
    def waits_for_destination(self) -> bool:
        """Whether tensors have nowhere to go until `deliver_to` is called."""
        return self._waits

    @property
    def ring_memory(self) -> Any | None:
        """The memory that bytes cross on their way here, to be pinned for a card; None where they need none."""
        return None if self._process is None else self._process.ring.memory

    def counters(self) -> dict[str, float]:
        """What reading took so far, as plain values (weights.counters.Counters says which)."""
        if self._fetcher is not None:
            return self._fetcher.counters.as_dict()
        found = self._process.counters if self._process is not None else {}
        return {**Counters(total_bytes=self.total_bytes).as_dict(), **found}

    def deliver_to(self, destination: Destination, on_host: Collection[str] = ()) -> None:
        """Let tensors come to lie in `destination` from now on; once, and only where it was waited for.

        Those of the folders `on_host` stay in this process's memory.
        """
        if self._process is None:
            raise WeightsError("the weights are read into host memory already")
        self._waits = False
        self._process.deliver(self._landings(destination, on_host), self._end)

    def configs(self) -> dict[str, bytes]:
        """Every config file, by its path; waits for the last of them. Raises WeightsError."""
        for config in self._configs.values():
            config.done.wait()
        self._raise_error(needed=self._configs.values())
        return {path: bytes(config.data) for path, config in self._configs.items()}

    def tensors(self) -> Iterator[LandedTensor]:
        """Every tensor once, as it lands. Raises WeightsError; what landed before that is then of no use."""
        while (tensor := self._landed.get()) is not None:
            yield tensor
            # The consumer may have let go of it: hold on to nothing while waiting for the next.
            del tensor
        self._landed.put(None)  # for whoever asks again
        self._raise_error()

    def close(self) -> None:
        """Stop reading and wait for the threads. Harmless when all has been read."""
        self._close(wait=True)

    def __enter__(self) -> ModelStream:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # After Ctrl-C nobody waits: a thread may be stuck on a server that says nothing.
        self._close(wait=kind is not KeyboardInterrupt)

    def _close(self, *, wait: bool) -> None:
        with self._lock:
            if self._closed:
                return
            self._closed = True
        reading = self._fetcher or self._process
        if reading is not None:
            reading.stop(wait=wait)
        self._end()

    def _read_in_threads(self, options: ReadOptions) -> None:
        cache = (
            NodeCache(options.cache_folder, options.cache_bytes) if options.cache_folder else None
        )
        folder = self.snapshot.folder
        self._fetcher = Fetcher(
            self._reader,
            self._files,
            Landings(self._landings(HostMemory(), ())),
            pace=Pace(
                options.connections,
                limit=max(LIMIT, options.connections or 0),
                first=first_connections(folder is None and self._reader().secure),
            ),
            verify=options.verify,
            cache=cache,
            folder=None if folder is None else ModelFolder(folder),
            on_end=self._end,
        )
        self._fetcher.start()

    def _landings(
        self, destination: Destination, on_host: Collection[str]
    ) -> dict[str, WholeFile | WeightFile]:
        landings: dict[str, WholeFile | WeightFile] = dict(self._configs)
        host = HostMemory()
        for file in self._files:
            if file.is_weights:
                there = host if file.path.rpartition("/")[0] in on_host else destination
                landings[file.path] = WeightFile(file, self._place(file), there, self._landed.put)
        return landings

    def _place(self, file: SnapshotFile) -> str:
        """Where a file comes from, for people."""
        if self.snapshot.folder is None and self._bucket is not None:
            return self._bucket.url(file.key)
        return f"{self.source}/{file.path}"

    def _reader(self) -> ObjectReader:
        if self._bucket is None:
            raise no_bucket_beside(Path(self.source))
        return self._bucket.reader

    def _end(self) -> None:
        """The reading is over, well or not: whoever waits is woken, and finds out."""
        reading = self._fetcher or self._process
        with self._lock:
            if self._error is None and reading is not None and reading.error is not None:
                self._error = self._understood(reading.error)
            if self.seconds is None and reading is not None and reading.complete:
                self.seconds = time.monotonic() - self.started
        for config in self._configs.values():
            config.done.set()
        self._landed.put(None)

    def _understood(self, error: BaseException) -> BaseException:
        if isinstance(
            error, (MemoryError, OSError)
        ):  # mmap says "Cannot allocate memory" as an OSError
            lacking = WeightsError(
                f"not enough memory for {self.source}, {self.total_bytes / 1e9:.2f} GB ({error}). "
                "Give the machine or the container more"
            )
            lacking.__cause__ = error
            return lacking
        return error

    def _raise_error(self, needed: Any = None) -> None:
        if self._error is not None:
            raise self._error
        if self.seconds is None and (needed is None or not all(item.complete for item in needed)):
            raise WeightsError(f"reading {self.source} was stopped before its end")


def _in_reading_order(snapshot: Snapshot) -> list[SnapshotFile]:
    """Configs, since the pipeline is built from them, then the weights in the order that a request needs them.

    By name that is text encoders, UNet, VAE.
    """
    configs = [file for file in snapshot.files if file.is_config]
    weights = [file for file in snapshot.files if file.is_weights]
    return [*configs, *weights]
