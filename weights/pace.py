"""How many connections to read over: chosen from the rates that are seen, without a clock or a socket of its own."""

from __future__ import annotations

import os

# Connections to begin with. On a free wire more bring nothing, and where each is slow the doubling below is quick. Over
# TLS each costs far more of the interpreter.
FIRST = 4
FIRST_OVER_TLS = 2
LIMIT = 64
WORTH_IT = 1.12  # a step up is kept when the rate grew by so much
# Bytes per second over one connection, from which on it keeps a good part of a core busy: with as many such connections
# as cores, more of them bring nothing, and trying costs.
FAST = 250e6
PLAINLY_SLOW = 125e6  # bytes per second over one connection
FIRST_STEP = 8  # times as many: S3 gives some 90 MB/s a connection, and a model is soon read
STEP = 2
LOOKS = 2  # intervals that a rate is the mean of: in one, a few reads more or less make a tenth
# Seconds after which a settled pace tries again whether more has become worth it. At first soon, since what looked like
# no gain may have been a hiccup; twice as long after each further try in vain.
SETTLED_FOR = 0.5
SETTLED_AT_MOST = 8.0
RESPITE = 5.0  # seconds without growth after the server asked for patience


class Pace:
    """The number of connections, `target`: pinned, or raised while that pays and lowered when the server asks.

    `observe` is told the rate of each short interval in which bytes flowed. Times are seconds on any one clock.
    """

    def __init__(
        self,
        pinned: int | None = None,
        limit: int = LIMIT,
        *,
        first: int = FIRST,
        cores: int | None = None,
    ) -> None:
        self.target = min(first, limit) if pinned is None else min(pinned, limit)
        self._pinned = pinned is not None
        self._limit = limit
        self._cores = cores or usable_cores()
        self._step = FIRST_STEP
        self._before: tuple[int, float] | None = (
            None  # connections and rate that the last step started from
        )
        self._settling = True
        self._seen: list[float] = []
        self._patience = SETTLED_FOR
        self._quiet_until = 0.0
        self._halved_at = -RESPITE

    def observe(self, rate: float, now: float) -> None:
        """Bytes per second over the last interval: step up, keep the last step, or take it back."""
        if self._pinned or now < self._quiet_until:
            return
        if self._settling:  # connections of the last step were still opening in this interval
            self._settling = False
            return
        self._seen.append(rate)
        if len(self._seen) < LOOKS and not self._is_plainly_slow(rate):
            return
        rate = sum(self._seen) / len(self._seen)
        self._seen.clear()
        if self._before is not None and rate < self._before[1] * WORTH_IT:
            # More brought nothing. What did as well with fewer is kept: connections cost the server and us.
            self._set(self._before[0])
            self._before = None
            self._quiet_until = now + self._patience
            self._patience = min(2 * self._patience, SETTLED_AT_MOST)
        elif self.target < self._limit and not self._cores_are_busy(rate):
            if self._before is not None:
                self._patience = SETTLED_FOR
            self._before = (self.target, rate)
            self._set(min(self._step * self.target, self._limit))
            self._step = STEP

    def _is_plainly_slow(self, rate: float) -> bool:
        """Whether the first step needs no second look: no hiccup of a fast wire's makes it this slow."""
        return self._step == FIRST_STEP and rate < PLAINLY_SLOW * self.target

    def _cores_are_busy(self, rate: float) -> bool:
        return self.target >= self._cores and rate >= FAST * self.target

    def throttled(self, now: float) -> None:
        """The server asked for patience: halve, and do not grow for a while. A pinned number stays."""
        if not self._pinned and now - self._halved_at >= RESPITE / 2:
            self._halved_at = now
            self._set(max(1, self.target // 2))
            self._before = None
        self._quiet_until = max(self._quiet_until, now + RESPITE)

    def _set(self, target: int) -> None:
        self.target = target
        self._settling = True
        self._seen.clear()


def first_connections(over_tls: bool) -> int:
    return FIRST_OVER_TLS if over_tls else FIRST


def usable_cores() -> int:
    """Cores that this process may use; a container's share of their time is not looked at."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
