"""How often a caller may ask: a token bucket for each, in memory, in this process.

Whether a request costs a token and what is answered when there is none is the caller's business.
"""

from __future__ import annotations

import ipaddress
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

MINUTE = 60.0
# About 100 bytes each.
MOST_CALLERS = 10_000
# A wait that was slept through exactly must be enough, whatever the rounding of its sum.
ROUNDING = 1e-6
# One customer's smallest network: whoever has one IPv6 address there has 2**64.
IPV6_CUSTOMER = 64


@dataclass(frozen=True)
class Rate:
    """Requests a minute in the long run, and how many may come at once after a pause."""

    per_minute: float
    burst: int

    def __post_init__(self) -> None:
        if not 0 < self.per_minute < float("inf"):
            raise ValueError(f"a rate needs more than 0 requests a minute, not {self.per_minute}")
        if self.burst < 1:
            raise ValueError(f"a rate needs a burst of at least 1 request, not {self.burst}")


class RateLimits:
    """One bucket for each caller, all of the same size.

    Only buckets that are not full are kept, since a full one is as good as a new one. When `most_callers` are kept,
    the one that asked longest ago makes room: strangers by the thousand cannot fill the memory, and cannot lock
    anyone out. Give strangers limits of their own, so that they cannot make a key's bucket be forgotten.
    """

    def __init__(
        self,
        rate: Rate,
        *,
        most_callers: int = MOST_CALLERS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._seconds_a_token = MINUTE / rate.per_minute
        self._seconds_to_fill_the_rest = self._seconds_a_token * (rate.burst - 1)
        self._most_callers = most_callers
        self._clock = clock
        # When each caller's bucket will be full again: all that a bucket has to remember (GCRA, ITU-T I.371).
        self._full_at: OrderedDict[str, float] = OrderedDict()

    def take(self, caller: str) -> float:
        """Take a token: 0.0 where there was one, else the seconds until there is. Refused requests cost nothing."""
        now = self._clock()
        full_at = max(self._full_at.get(caller, now), now)
        wait = full_at - now - self._seconds_to_fill_the_rest
        if wait > ROUNDING:
            self._full_at.move_to_end(caller)  # or strangers could make a refused one be forgotten
            return wait
        self._full_at[caller] = full_at + self._seconds_a_token
        self._full_at.move_to_end(caller)
        self._forget(now)
        return 0.0

    def __len__(self) -> int:
        """How many buckets are kept."""
        return len(self._full_at)

    def _forget(self, now: float) -> None:
        """Drop what is full again, two at most, so that no request pays for many; and always what is too many."""
        for _ in range(2):
            oldest = next(iter(self._full_at))
            if self._full_at[oldest] > now and len(self._full_at) <= self._most_callers:
                return
            del self._full_at[oldest]


def network_of(address: str) -> str:
    """What to count a caller without a key by: the IPv4 address, or the IPv6 network that one customer has.

    Text that is no address, such as a Unix socket's empty one, is returned as it is.
    """
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return address
    if isinstance(parsed, ipaddress.IPv6Address):
        if parsed.ipv4_mapped is not None:
            return str(parsed.ipv4_mapped)
        # The scope ("%eth0") is no part of a network, and ip_network would not take it.
        return str(ipaddress.IPv6Network((int(parsed), IPV6_CUSTOMER), strict=False))
    return str(parsed)
