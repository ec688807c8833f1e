"""One span of chunks on its way into memory: asked for again when the wire breaks, refused when the bytes are wrong.

A retry goes on from the byte that was reached. No chunk's memory is allocated here.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

from blake3 import blake3

from weights.chunks import Chunk, SnapshotFile
from weights.errors import BucketError, CorruptObjectError, ObjectChangedError, WeightsError
from weights.objects import BusyError, RangeAnswer, pause_after
from weights.transport import CertificateError, Connection, StalledError, TransportError

if TYPE_CHECKING:
    from weights.cache import CachedFile, NodeCache
    from weights.counters import Counters
    from weights.model_folder import FolderFile, ModelFolder
    from weights.objects import ObjectReader

ATTEMPTS = 6  # without getting on
CORRUPT_ATTEMPTS = (
    3  # wrong bytes are mostly wrong in the bucket; a few tries tell the wire's faults
)
TOTAL_ATTEMPTS = 40  # however little each brings, it ends
GETTING_ON = 256 * 1024  # bytes; an attempt that brings less is as good as none
SCRAP = 1024 * 1024  # bytes read and thrown away at once, where a server ignores ranges
HASH_STEP = 4 * 1024 * 1024  # bytes; in steps of 1 MiB the same load took 7 % longer over TLS
OVERDUE = 2.0  # times the patience for a stall: then what another process was to fetch is fetched here too

logger = logging.getLogger(__name__)


class Sink(Protocol):
    """Where chunks go. Called from many threads, for one chunk from one thread at a time."""

    def room(self, chunk: Chunk, offset: int) -> memoryview:
        """Memory for the chunk's bytes from `offset` on, at least one; may wait until there is some."""

    def filled(self, chunk: Chunk, offset: int, count: int) -> None:
        """`count` bytes are now in what `room` gave last. They may come again, if they turn out to be wrong."""

    def landed(self, chunk: Chunk) -> None:
        """All the chunk's bytes are there and verified. May raise what the bytes themselves are guilty of."""

    def leave(self) -> None:
        """The calling thread reads no more."""


class LocalFile(Protocol):
    """A file on this machine's disk, whose chunks may be here, and may be right."""

    def has(self, index: int) -> bool:
        """Whether to try and read the chunk here."""

    def read_at(self, index: int, offset: int, into: memoryview) -> int:
        """Read some of the chunk's bytes from `offset` on; how many, 0 where there are none to be had."""

    def forget(self, index: int) -> None:
        """The chunk's bytes were not the right ones."""


class Route:
    """What all flights of one load share: whom to ask, where bytes go, and what has been seen of each object.

    With a folder, `reader` is called when the bucket is first needed: where all of the model lies there, never.
    """

    def __init__(
        self,
        reader: Callable[[], ObjectReader],
        sink: Sink,
        counters: Counters,
        *,
        verify: bool = True,
        cache: NodeCache | None = None,
        folder: ModelFolder | None = None,
    ) -> None:
        self._find_reader = reader
        self._reader = None if folder else reader()
        self.sink = sink
        self.counters = counters
        self.verify = verify
        # Where a server ignores ranges, what follows in the same answer is taken too. Set by the fetcher.
        self.following: Callable[[Chunk], list[Chunk]] = lambda _chunk: []
        self._folder = folder
        self._cache = cache
        self._cached: dict[str, CachedFile | None] = {}
        self._etags: dict[str, str] = {}
        self._wanted_since: dict[tuple[str, int], float] = {}
        self._lock = threading.Lock()

    @property
    def reader(self) -> ObjectReader:
        """The bucket. Raises WeightsError or SettingsError where it cannot be asked."""
        with self._lock:
            if self._reader is None:
                self._reader = self._find_reader()
            return self._reader

    def in_folder(self, file: SnapshotFile) -> FolderFile | None:
        """The file in the folder that the model was pulled to; None where there is none."""
        return None if self._folder is None or file.digests is None else self._folder.open(file)

    def cached(self, file: SnapshotFile) -> CachedFile | None:
        """The file in the node's cache; None where there is no cache, no room in it, or no name for the content."""
        if self._cache is None or file.content is None or file.digests is None:
            return None
        with self._lock:
            if file.path not in self._cached:
                self._cached[file.path] = self._cache.open(file.content, file.size, file.digests)
            return self._cached[file.path]

    def is_overdue(self, chunk: Chunk) -> bool:
        """Whether another process has had this chunk for so long that it had better be fetched here too."""
        now = time.monotonic()
        with self._lock:
            since = self._wanted_since.setdefault((chunk.file.path, chunk.index), now)
        return now - since > OVERDUE * self.reader.patience.stall

    def expected_etag(self, file: SnapshotFile) -> str | None:
        return file.etag or self._etags.get(file.key)

    def remember_etag(self, file: SnapshotFile, etag: str) -> None:
        """Hold every answer to the first whose bytes were right. Raises ObjectChangedError."""
        with self._lock:
            first = self._etags.setdefault(file.key, etag)
        if first != etag:
            raise ObjectChangedError(
                f"{self.reader.url(file.key)} was replaced while it was read (ETag {etag}, before {first}). "
                "Load again"
            )

    def close(self) -> None:
        with self._lock:
            for cached in self._cached.values():
                if cached is not None:
                    cached.close()
            self._cached.clear()
            if self._reader is not None:
                self._reader.close()
        if self._folder is not None:
            self._folder.close()


class _TakenOverError(Exception):
    """Another thread has read the chunk, or nobody wants it any more. Never leaves this file."""


class _RefusedError(Exception):
    """The sink refuses verified bytes: reading them again changes nothing. Never leaves this file."""

    def __init__(self, reason: WeightsError) -> None:
        super().__init__(reason)
        self.reason = reason


class Flight:
    """Chunks of one file that lie next to each other, read by one thread; others may look on, or end it."""

    def __init__(self, route: Route, chunks: Sequence[Chunk], *, after: float = 0.0) -> None:
        self.chunks = list(chunks)  # not landed yet; the first is the one being read
        self.landed: list[Chunk] = []
        self.elsewhere: list[Chunk] = []  # another process on this node is fetching these
        self.durations: list[float] = []  # seconds that each chunk from the network took
        self.since = time.monotonic()  # of the chunk being read
        self.reading = (
            False  # from the network, rather than waiting for room or before another attempt
        )
        self.hedged = False
        self.lock = threading.Lock()
        self.over = threading.Event()
        self._route = route
        self._after = after
        self._file = chunks[0].file
        self._cached: CachedFile | None = None  # once the cache has been looked into
        self._offset = 0  # bytes of the first chunk that are in the sink
        self._hasher = blake3()
        self._received = 0
        self._ended = threading.Event()
        self._attaching = threading.Lock()
        self._connection: Connection | None = None

    def run(self) -> None:
        """Land every chunk, or move it to `elsewhere`. Raises WeightsError.

        When the flight was ended by `abort`, what is still in `chunks` has not landed.
        """
        try:
            if self._after:
                self._ended.wait(self._after)
            self._look_into_folder()
            if self.chunks:
                self._look_into_cache()
            self._fetch()
        except _TakenOverError:
            pass
        except _RefusedError as refused:
            raise refused.reason from None
        finally:
            self.reading = False
            self._release_claims()
            self.over.set()

    @property
    def fills_the_cache(self) -> bool:
        """Whether all processes of this node wait for the same bytes, and read them once."""
        return self._cached is not None

    def remaining_seconds(self, now: float) -> float:
        """What the chunk being read will still take, at the rate it has had so far."""
        chunk = next(iter(self.chunks), None)
        if chunk is None or not self._offset:
            return math.inf
        return (now - self.since) * (chunk.length - self._offset) / self._offset

    def abort(self) -> None:
        """End it, from any thread: whatever it waits for, it wakes."""
        self._ended.set()
        with self._attaching:
            if self._connection is not None:
                self._connection.abort()

    def attach(self, connection: Connection | None) -> None:
        """The connection that `abort` is to wake; None once it is no longer this flight's."""
        with self._attaching:
            self._connection = connection
            if connection is not None and self._ended.is_set():
                connection.abort()

    def _remaining(self) -> list[Chunk]:
        """What is left to be read, the first of it now; a hedge may take that away at any moment."""
        with self.lock:
            if self._ended.is_set() or not self.chunks:
                raise _TakenOverError
            return list(self.chunks)

    def _fetch(self) -> None:
        attempts = total = corrupt = 0
        while self.chunks:
            received = self._received
            try:
                self._read_span()
            except (TransportError, BucketError, CorruptObjectError, ObjectChangedError) as error:
                self.reading = False
                if self._ended.is_set():
                    raise _TakenOverError from None
                total += 1
                attempts = 1 if self._received - received >= GETTING_ON else attempts + 1
                corrupt += isinstance(error, (CorruptObjectError, ObjectChangedError))
                final = self._final(error, attempts, total, corrupt)
                if final is not None:
                    raise final from error
                self._pause(error, attempts)

    def _final(
        self, error: Exception, attempts: int, total: int, corrupt: int
    ) -> WeightsError | None:
        """The error to end with; None where another attempt may help."""
        if isinstance(error, TransportError):
            if (
                attempts < ATTEMPTS
                and total < TOTAL_ATTEMPTS
                and not isinstance(error, CertificateError)
            ):
                return None
            return self._route.reader.explained(self._file.key, error, doing=self._doing())
        if isinstance(error, BucketError):
            # With a code of S3's it is the server's last word; without one the answer itself was not usable.
            return error if error.code or attempts >= CORRUPT_ATTEMPTS else None
        if isinstance(error, (CorruptObjectError, ObjectChangedError)):
            return error if corrupt >= CORRUPT_ATTEMPTS or self._file.etag else None
        raise error

    def _doing(self) -> str:
        if not self.chunks:
            return "read"
        return f"read bytes {self.chunks[0].start} to {self.chunks[-1].end - 1} of"

    def _pause(self, error: Exception, attempts: int) -> None:
        pause = pause_after(attempts, error, self._route.reader.patience)
        self._route.counters.add(
            retries=1,
            stalls=isinstance(error, StalledError),
            throttled=isinstance(error, BusyError) and error.throttled,
            corrupt_chunks=isinstance(error, CorruptObjectError),
        )
        where = self._route.reader.url(self._file.key)
        logger.warning("reading %s again in %.1f s: %s", where, pause, error)
        if self._ended.wait(pause):
            raise _TakenOverError
        self.since = time.monotonic()

    def _read_span(self) -> None:
        """One request for what is left, from the byte that was reached."""
        route, file = self._route, self._file
        chunks = self._remaining()
        position = chunks[0].start + self._offset
        end = chunks[-1].end
        route.counters.add(requests=1)
        self.reading = True
        try:
            with route.reader.open_range(
                file.key,
                position,
                end,
                size=file.size,
                etag=route.expected_etag(file),
                on_connection=self.attach,
            ) as answer:
                whole = answer.start == 0 and end != file.size
                self._skip(answer, position - answer.start)
                while self.chunks:
                    self._read_chunk(answer)
                    if whole and not self.chunks:
                        self.chunks.extend(route.following(self.landed[-1]))
        finally:
            self.attach(None)

    def _skip(self, answer: RangeAnswer, count: int) -> None:
        """Past what comes before the wanted bytes, where the server ignored the range."""
        if not count:
            return
        logger.warning(
            "the server ignores ranges: reading past %.1f MB of %s. Check the proxy or cache in front of the bucket",
            count / 1e6,
            self._route.reader.url(self._file.key),
        )
        scrap = memoryview(bytearray(min(SCRAP, count)))
        while count:
            count -= answer.read(scrap[:count])

    def _read_chunk(self, answer: RangeAnswer) -> None:
        route, chunk, cached = self._route, self._remaining()[0], self._cached
        hash_seconds = 0.0
        while self._offset < chunk.length:
            self.reading = False
            room = route.sink.room(chunk, self._offset)[:HASH_STEP]
            self.reading = True
            count = answer.read(room)
            got = room[:count]
            if route.verify:
                started = time.perf_counter()
                self._hasher.update(got)
                hash_seconds += time.perf_counter() - started
            if cached is not None:
                cached.write_at(chunk.index, self._offset, got)
            route.sink.filled(chunk, self._offset, count)
            self._offset += count
            self._received += count
            route.counters.add(network_bytes=count)
        route.counters.add(hash_seconds=hash_seconds)
        self._check(chunk, answer.etag)
        if cached is not None:
            cached.complete(chunk.index)
        self._land(chunk, from_network=True)

    def _check(self, chunk: Chunk, etag: str) -> None:
        """Compare digest and ETag. Raises CorruptObjectError or ObjectChangedError, and then begins the chunk anew."""
        digest = self._hasher.hexdigest()
        self._hasher = blake3()
        self._offset = 0
        if self._route.verify and chunk.digest is not None and digest != chunk.digest:
            raise CorruptObjectError(
                f"{self._route.reader.url(chunk.file.key)} is corrupt: bytes {chunk.start} to {chunk.end - 1} "
                "are not the bytes that were published (their BLAKE3 differs). Publish the model again with "
                "prepare_model.py --repair, which sends every file anew, or go back to an earlier version with "
                "`python -m weights activate`"
            )
        # Only now: the ETag of a stale answer, from a cache that was wrong once, must not decide about the others.
        self._route.remember_etag(chunk.file, etag)

    def _land(self, chunk: Chunk, *, from_network: bool) -> None:
        with self.lock:  # whoever has it decides: this thread, or a hedge that was faster
            if self._ended.is_set():
                raise _TakenOverError
            self.chunks.remove(chunk)
        try:
            self._route.sink.landed(chunk)
        except WeightsError as error:
            raise _RefusedError(error) from error
        self._route.counters.add(landed_bytes=chunk.length)
        self.landed.append(chunk)
        now = time.monotonic()
        if from_network:
            self.durations.append(now - self.since)
        self.since = now

    def _look_into_folder(self) -> None:
        """Land what the folder has that the model was pulled to."""
        file = self._route.in_folder(self._file)
        if file is None:
            return
        for chunk in list(self.chunks):
            if self._land_from_disk(chunk, file):
                self._route.counters.add(folder_bytes=chunk.length)

    def _look_into_cache(self) -> None:
        """Land what the node's cache has, and leave to other processes what they are fetching already.

        Of at most two neighbours any part that remains is still one range.
        """
        cached = self._cached = self._route.cached(self._file)
        if cached is None:
            return
        for chunk in list(self.chunks):
            if self._land_from_cache(chunk, cached):
                continue
            if cached.claim(chunk.index):
                if self._land_from_cache(chunk, cached):  # it came between the two questions
                    cached.release(chunk.index)
            elif not self._route.is_overdue(chunk):
                self.chunks.remove(chunk)
                self.elsewhere.append(chunk)

    def _land_from_cache(self, chunk: Chunk, cached: CachedFile) -> bool:
        if not self._land_from_disk(chunk, cached):
            return False
        self._route.counters.add(cache_bytes=chunk.length)
        return True

    def _land_from_disk(self, chunk: Chunk, file: LocalFile) -> bool:
        """Whether the file had the chunk's bytes, and they were the right ones."""
        if not file.has(chunk.index):
            return False
        sink, offset, hasher, hash_seconds = self._route.sink, 0, blake3(), 0.0
        while offset < chunk.length:
            if self._ended.is_set():
                raise _TakenOverError
            room = sink.room(chunk, offset)[:HASH_STEP]
            count = file.read_at(chunk.index, offset, room)
            if not count:
                break
            started = time.perf_counter()
            hasher.update(room[:count])
            hash_seconds += time.perf_counter() - started
            sink.filled(chunk, offset, count)
            offset += count
        self._route.counters.add(hash_seconds=hash_seconds)
        if hasher.hexdigest() != chunk.digest:
            file.forget(chunk.index)
            return False
        self._land(chunk, from_network=False)
        return True

    def _release_claims(self) -> None:
        if self._cached is not None:
            for chunk in self.chunks:
                self._cached.release(chunk.index)
