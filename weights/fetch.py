"""Chunks from the bucket into memory, over several connections at once, verified as they land.

This file decides what is read next and by whom; how one chunk is read, again and again if need be, is `flight.py`.
Where the bytes go is the sink's business.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from weights.chunks import Chunk, SnapshotFile
from weights.counters import Counters
from weights.errors import WeightsError
from weights.flight import Flight, Route, Sink
from weights.hedge import Hedge
from weights.pace import Pace

if TYPE_CHECKING:
    from weights.cache import NodeCache
    from weights.model_folder import ModelFolder
    from weights.objects import ObjectReader

REQUEST_CHUNKS = 2  # in one request: 32 MiB, the most that TAG keeps of one range
# Chunks at once that are read before it is known where they belong; each is copied when it is. In host memory they take
# the place of what they are copied to, which nobody has touched yet; beside a card they come on top of the ring.
AHEAD = 32
AHEAD_OF_A_CARD = 12
INTERVAL = 0.1  # seconds between two looks at the rate
CLAIMED_ELSEWHERE = 0.01  # seconds between two looks at chunks that another process is fetching
HEDGE_AFTER = 3.0  # times the median time of a chunk
HEDGE_AT_LEAST = 1.0  # seconds
HEDGES = 2  # at once: when all are slow, the wire is, and asking twice makes it slower


class Fetcher:
    """Reads `files` into `sink` on threads of its own; `on_end` is called when that has ended, well or not.

    `folder` is looked into first, then `cache`; `reader` is called for what neither has.

    Small files first, then every weight file's first chunk, which says what is in it; the rest of a file queues up in
    its order as soon as that has landed. Threads that would wait for it take a few chunks ahead of it.
    """

    def __init__(
        self,
        reader: Callable[[], ObjectReader],
        files: Iterable[SnapshotFile],
        sink: Sink,
        *,
        pace: Pace,
        verify: bool = True,
        cache: NodeCache | None = None,
        folder: ModelFolder | None = None,
        ahead: int = AHEAD,
        on_end: Callable[[], None] | None = None,
    ) -> None:
        self.counters = Counters()
        self.error: BaseException | None = None
        self._pace = pace
        self._on_end = on_end
        self._changed = threading.Condition()
        self._stopped = threading.Event()
        self._route = Route(reader, sink, self.counters, verify=verify, cache=cache, folder=folder)
        self._route.following = self._following
        self._sink = sink
        self._waiting: deque[list[Chunk]] = deque()
        self._elsewhere: deque[list[Chunk]] = (
            deque()
        )  # being fetched by another process on this node
        self._rests: dict[str, list[Chunk]] = {}
        self._most_ahead = ahead
        self._ahead: dict[str, int] = {}  # chunks taken from each rest
        self._in_flight: list[Flight] = []
        self._hedges: list[Hedge] = []
        self._pending = 0  # chunks not landed yet
        self._threads: list[threading.Thread] = []
        self._working = 0
        self._durations: deque[float] = deque(maxlen=64)  # seconds a chunk
        self._over = threading.Event()
        self._keeper = threading.Thread(target=self._keep_pace, name="weights-pace", daemon=True)
        for file in files:
            chunks = list(file.chunks())
            self._pending += len(chunks)
            self.counters.total_bytes += file.size
            if file.is_weights and len(chunks) > 1:
                self._waiting.append(chunks[:1])
                self._rests[file.path] = chunks[1:]
            else:
                self._waiting.extend(_requests(chunks))

    def start(self) -> None:
        if self._pending:
            self._hire()
        else:
            self._end()
        self._keeper.start()

    def wait(self, seconds: float | None = None) -> bool:
        """Wait for the end, good or bad; whether it came."""
        return self._over.wait(seconds)

    def stop(self, *, wait: bool = True) -> None:
        """Read no more; wait for the threads, which are woken from whatever they wait for."""
        self._stopped.set()
        with self._changed:
            tasks: list[Flight | Hedge] = [*self._in_flight, *self._hedges]
            self._changed.notify_all()
        for task in tasks:
            task.abort()
        self._over.set()
        if wait:
            for thread in [*self._threads, self._keeper]:
                if thread is not threading.current_thread() and thread.ident is not None:
                    thread.join()
            self._route.close()

    @property
    def complete(self) -> bool:
        return self._pending == 0

    def _keep_pace(self) -> None:
        """Watch the rate, and see to it that as many threads read as the pace says."""
        seen, since = 0, time.monotonic()
        throttled = 0
        while not self._over.wait(INTERVAL):
            now = time.monotonic()
            got = self.counters.network_bytes
            if self.counters.throttled > throttled:
                throttled = self.counters.throttled
                self._pace.throttled(now)
            if (
                got > seen and self._waiting
            ):  # at the end there is less to do than there are threads
                self._pace.observe((got - seen) / (now - since), now)
            seen, since = got, now
            self._hire()

    def _hire(self) -> None:
        with self._changed:
            self._threads = [thread for thread in self._threads if thread.is_alive()]
            ahead = self._allowed_ahead() if any(self._rests.values()) else 0
            work = self._working + len(self._waiting) + len(self._elsewhere) + ahead
            missing = min(self._pace.target, work) - self._working
            for _ in range(missing):
                thread = threading.Thread(target=self._work, name="weights-read", daemon=True)
                self._threads.append(thread)
                self._working += 1
                thread.start()
            self.counters.connections = max(self.counters.connections, self._working)

    def _work(self) -> None:
        try:
            while (task := self._next()) is not None:
                task.run()
                self._finish(task)
        except BaseException as error:  # noqa: BLE001 - whatever it is, the one who waits is told
            self._fail(error)
        finally:
            self._sink.leave()
            with self._changed:
                self._working -= 1

    def _next(self) -> Flight | Hedge | None:
        """What this thread does next; waits while there may be something. None: nothing any more."""
        with self._changed:
            while True:
                if self._stopped.is_set() or self._pending == 0:
                    return None
                if self._working > self._pace.target:
                    return None
                if self._waiting:
                    return self._take_off(self._share_of(self._waiting.popleft()))
                if ahead := self._take_ahead():
                    return self._take_off(ahead)
                if self._elsewhere:
                    return self._take_off(self._elsewhere.popleft(), after=CLAIMED_ELSEWHERE)
                if (hedge := self._hedge()) is not None:
                    return hedge
                self._changed.wait(0.05)

    def _share_of(self, request: list[Chunk]) -> list[Chunk]:
        """Near the end a request is divided, so that nobody is left with twice as much as the others."""
        if len(request) > 1 and len(self._waiting) < self._working:
            self._waiting.appendleft(request[1:])
            return request[:1]
        return request

    def _take_ahead(self) -> list[Chunk]:
        """The next chunk of a file whose first has not landed yet; none where enough of them are on their way."""
        for path, rest in self._rests.items():
            if rest and self._allowed_ahead():
                self._ahead[path] = self._ahead.get(path, 0) + 1
                return [rest.pop(0)]
        return []

    def _allowed_ahead(self) -> int:
        return self._most_ahead - sum(self._ahead.values())

    def _take_off(self, chunks: Sequence[Chunk], after: float = 0.0) -> Flight:
        flight = Flight(self._route, chunks, after=after)
        self._in_flight.append(flight)
        return flight

    def _finish(self, task: Flight | Hedge) -> None:
        with self._changed:
            for chunk in task.landed:
                self._pending -= 1
                if chunk.index == 0:
                    self._waiting.extend(_requests(self._rests.pop(chunk.file.path, [])))
                    self._ahead.pop(chunk.file.path, None)
            if isinstance(task, Flight):
                self._in_flight.remove(task)
                self._durations.extend(task.durations)
                self._elsewhere.extend(_requests(task.elsewhere))
                self._waiting.extend(_requests(task.chunks))  # where a hedge has ended it
            else:
                self._hedges.remove(task)
            done = self._pending == 0
            self._changed.notify_all()
        if done:
            self._end()
        self._hire()

    def _following(self, chunk: Chunk) -> list[Chunk]:
        """What waits to be read next after `chunk` in the same file; it waits no longer."""
        with self._changed:
            for request in self._waiting:
                if request[0].file is chunk.file and request[0].start == chunk.end:
                    self._waiting.remove(request)
                    return request
        return []

    def _hedge(self) -> Hedge | None:
        """A second try beside the slowest flight, when it takes far longer than others did.

        Not where a node's replicas share what is read: while they start together the cores are what is slow, and of
        8 replicas' hedges none was ever first; they only had up to an eighth of the model sent twice.
        """
        if not self._durations or len(self._hedges) >= HEDGES:
            return None
        usual = statistics.median(self._durations)
        now = time.monotonic()
        stuck = [
            flight
            for flight in self._in_flight
            if flight.reading
            and not flight.hedged
            and not flight.fills_the_cache
            and now - flight.since > max(HEDGE_AT_LEAST, HEDGE_AFTER * usual)
            and flight.remaining_seconds(now) > HEDGE_AFTER * usual
        ]
        if not stuck:
            return None
        slowest = min(stuck, key=lambda flight: flight.since)
        hedge = Hedge(self._route, slowest)
        self._hedges.append(hedge)
        return hedge

    def _fail(self, error: BaseException) -> None:
        with self._changed:
            if self.error is None and not self._stopped.is_set():
                self.error = error
            self._stopped.set()
            tasks: list[Flight | Hedge] = [*self._in_flight, *self._hedges]
            self._changed.notify_all()
        for task in tasks:
            task.abort()
        self._end()

    def _end(self) -> None:
        if not self._over.is_set():
            self._over.set()
            if self._on_end:
                self._on_end()

    def raise_error(self, where: str) -> None:
        """Raise what went wrong, or that the end was not reached; harmless when all has landed."""
        if self.error is not None:
            raise self.error
        if self._pending:
            raise WeightsError(f"reading {where} was stopped before its end")


def _requests(chunks: Sequence[Chunk]) -> list[list[Chunk]]:
    """Neighbours in one file together, as many as one request may ask for."""
    requests: list[list[Chunk]] = []
    for chunk in chunks:
        last = requests[-1] if requests else []
        if (
            last
            and len(last) < REQUEST_CHUNKS
            and last[-1].file is chunk.file
            and last[-1].end == chunk.start
        ):
            last.append(chunk)
        else:
            requests.append([chunk])
    return requests
