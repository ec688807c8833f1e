"""What a preparation has before it, does, and has done, in bytes and seconds; and what may be foretold from that.

Decides what is true at a moment and shows nothing: that is the displays'.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from preparation.errors import CancelledStageError

Clock = Callable[[], float]

# A rate is what the last half minute brought, or the last few arrivals where those are rarer: an upload over a slow
# line hears of a part of 32 MiB every minute, and is neither standing still nor racing in between.
_WINDOW_SECONDS = 30.0
_WINDOW_ARRIVALS = 8
_MARK_SECONDS = 1.0  # arrivals closer together than this count as one
_FORETOLD_AFTER = 3.0  # seconds; before that a rate is mostly how long a connection takes to open
_MEASURED_FROM = 1.0  # seconds of a finished stage; less says how fast something was skipped


@dataclass(frozen=True)
class Upcoming:
    """A stage that is to come. `size` in bytes; None where nobody knows yet, a bound where it is `at_most` that."""

    name: str
    size: int | None
    at_most: bool = False


class Meter:
    """Counts bytes, and tells at what rate they come. Safe to use from many threads; times are in seconds."""

    def __init__(self, now: float) -> None:
        self.done = 0
        self._began = now
        self._arrivals = 0
        self._marks = deque([(now, 0)])  # when how many had come
        self._lock = threading.Lock()

    def count(self, size: int, now: float) -> None:
        """Count bytes; negative ones are those of a transfer that has to come again, as if they had never come."""
        with self._lock:
            self.done += size
            if size < 0:
                self._marks = deque((time, done + size) for time, done in self._marks)
            elif now - self._marks[-1][0] >= _MARK_SECONDS:
                self._marks.append((now, self.done))
                self._arrivals += 1
                start = now - self._window(now)
                while len(self._marks) > 1 and self._marks[1][0] <= start:
                    self._marks.popleft()

    def rate(self, now: float) -> float | None:
        """Bytes per second of late, 0 when nothing has come; None before anything can be said."""
        with self._lock:
            if now - self._began < _MARK_SECONDS:
                return None
            start = now - self._window(now)
            time, done = self._marks[0]
            for later in self._marks:
                if later[0] > start:
                    break
                time, done = later
            return (self.done - done) / (now - time)

    def _window(self, now: float) -> float:
        usual = (now - self._began) / max(1, self._arrivals)
        return max(_WINDOW_SECONDS, _WINDOW_ARRIVALS * usual)


class Stage:
    """A running stage; `advance` may be called from any thread."""

    def __init__(self, name: str, total: int, clock: Clock, cancelled: threading.Event) -> None:
        self.name = name
        self.total = total
        self._clock = clock
        self._cancelled = cancelled
        self._began = clock()
        self._meter = Meter(self._began)

    @property
    def done(self) -> int:
        """Bytes so far. More or less than `total` at the end where that was announced wrongly."""
        return self._meter.done

    @property
    def seconds(self) -> float:
        """Since it began."""
        return self._clock() - self._began

    def advance(self, size: int) -> None:
        """Count bytes; negative when a transfer had to start again.

        Raises:
            CancelledStageError: the preparation was interrupted, so the calling thread should end.
        """
        if self._cancelled.is_set():
            raise CancelledStageError("interrupted")
        self._meter.count(size, self._clock())

    def rate(self) -> float | None:
        """Bytes per second of late; None before anything can be said."""
        return self._meter.rate(self._clock())

    def remaining(self) -> float | None:
        """Seconds until it is done at that rate; None where that is anybody's guess."""
        rate, left = self.rate(), self.total - self.done
        if not rate or left <= 0 or self.seconds < _FORETOLD_AFTER:
            return None
        return left / rate


class Overview:
    """All stages of all models of a run. One thread at a time may change it; any may read meanwhile."""

    def __init__(self, clock: Clock) -> None:
        self.running: tuple[Stage, ...] = ()
        self.to_come: tuple[Upcoming, ...] = ()
        self.later: tuple[tuple[Upcoming, ...], ...] = ()  # of the models after this one
        self._clock = clock
        self._began = clock()
        self._measured: dict[str, tuple[int, float]] = {}  # bytes and seconds, by the stage's name

    @property
    def seconds(self) -> float:
        """Since the run began."""
        return self._clock() - self._began

    def expect(self, stages: Iterable[Upcoming], later: Iterable[Sequence[Upcoming]] = ()) -> None:
        """What comes now, in this order, and after it for other models. Stages without a byte are left out."""
        self.to_come = tuple(stage for stage in stages if stage.size != 0)
        self.later = tuple(tuple(model) for model in later)

    def pass_by(self, name: str) -> None:
        """The stage of that name is no longer to come, nor are those before it: what was not needed is not made up."""
        names = [stage.name for stage in self.to_come]
        if name in names:
            self.to_come = self.to_come[names.index(name) + 1 :]

    def begin(self, stage: Stage) -> None:
        self.pass_by(stage.name)
        self.running = (*self.running, stage)

    def end(self, stage: Stage, *, finished: bool) -> None:
        self.running = tuple(other for other in self.running if other is not stage)
        if finished and stage.done > 0 and stage.seconds >= _MEASURED_FROM:
            done, seconds = self._measured.get(stage.name, (0, 0.0))
            self._measured[stage.name] = (done + stage.done, seconds + stage.seconds)

    def remaining(self) -> float | None:
        """Seconds to the end of the run; None unless every stage to come has a size and was measured before.

        So a single model is foretold in its last stage only, where nothing is to come. What its upload will be is
        known once it is hashed, and how fast the bucket takes it once it does.
        """
        running = [stage.remaining() for stage in self.running]
        if not running:
            return None
        seconds = 0.0
        for one in running:
            if one is None:
                return None
            seconds = max(seconds, one)
        for stage in (*self.to_come, *(stage for model in self.later for stage in model)):
            if stage.size == 0:
                continue
            if stage.size is None or stage.name not in self._measured:
                return None
            done, took = self._measured[stage.name]
            seconds += stage.size * took / done
        return seconds
