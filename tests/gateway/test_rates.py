"""A burst at once, the rate after it, and no more memory than was allowed, whoever asks."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.rates import Rate, RateLimits, network_of


class Clock:
    """A monotonic clock that moves when told."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_a_burst_passes_and_the_next_one_is_told_how_long_to_wait(clock: Clock) -> None:
    limits = RateLimits(Rate(per_minute=6, burst=3), clock=clock)

    assert [limits.take("alice") for _ in range(5)] == [0.0, 0.0, 0.0, 10.0, 10.0]


def test_waiting_as_long_as_told_is_enough_and_no_less_is(clock: Clock) -> None:
    limits = RateLimits(Rate(per_minute=7, burst=2), clock=clock)
    while (wait := limits.take("alice")) == 0.0:
        pass

    clock.now += wait * 0.9
    assert limits.take("alice") == pytest.approx(wait * 0.1)

    clock.now += limits.take("alice")
    assert limits.take("alice") == 0.0


def test_a_pause_fills_the_bucket_and_never_more_than_the_burst(clock: Clock) -> None:
    limits = RateLimits(Rate(per_minute=60, burst=2), clock=clock)
    assert [limits.take("alice") for _ in range(2)] == [0.0, 0.0]

    clock.now += 3600

    assert [limits.take("alice") for _ in range(3)] == [0.0, 0.0, 1.0]


def test_callers_do_not_share_a_bucket(clock: Clock) -> None:
    limits = RateLimits(Rate(per_minute=1, burst=1), clock=clock)

    assert limits.take("alice") == 0.0
    assert limits.take("bob") == 0.0
    assert limits.take("alice") == 60.0


@given(
    per_minute=st.floats(0.1, 10_000),
    burst=st.integers(1, 20),
    pauses=st.lists(st.floats(0, 100), max_size=60),
)
def test_no_stretch_of_time_lets_through_more_than_burst_and_rate(
    per_minute: float, burst: int, pauses: list[float]
) -> None:
    clock = Clock()
    limits = RateLimits(Rate(per_minute, burst), clock=clock)
    passed = []
    for pause in pauses:
        clock.now += pause
        if limits.take("alice") == 0.0:
            passed.append(clock.now)

    for first in range(len(passed)):
        for last in range(first, len(passed)):
            most = burst + (passed[last] - passed[first]) * per_minute / 60
            assert last - first + 1 <= most + 0.01


def test_strangers_without_number_take_no_more_room_than_allowed(clock: Clock) -> None:
    limits = RateLimits(Rate(per_minute=1, burst=1), most_callers=100, clock=clock)

    for number in range(10_000):
        assert limits.take(f"stranger {number}") == 0.0
        assert len(limits) <= 100

    assert limits.take("stranger 9999") > 0.0


def test_buckets_that_are_full_again_are_forgotten(clock: Clock) -> None:
    limits = RateLimits(Rate(per_minute=60, burst=5), clock=clock)
    for number in range(1000):
        limits.take(f"stranger {number}")

    clock.now += 60
    for _ in range(1000):
        limits.take("alice")
        clock.now += 1

    assert len(limits) == 1


def test_a_caller_who_keeps_asking_is_not_the_one_who_makes_room(clock: Clock) -> None:
    limits = RateLimits(Rate(per_minute=60, burst=10), most_callers=10, clock=clock)

    taken = 0
    for number in range(30):
        limits.take(f"stranger {number}")
        taken += limits.take("alice") == 0.0

    assert taken == 10


@pytest.mark.parametrize(
    ("per_minute", "burst"), [(0, 1), (-1, 1), (float("inf"), 1), (float("nan"), 1), (1, 0)]
)
def test_a_rate_that_lets_nobody_in_is_refused(per_minute: float, burst: int) -> None:
    with pytest.raises(ValueError, match="a rate needs"):
        Rate(per_minute, burst)


@pytest.mark.parametrize(
    ("address", "network"),
    [
        ("203.0.113.9", "203.0.113.9"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2::", "2001:db8:1:2::/64"),
        ("::ffff:203.0.113.9", "203.0.113.9"),
        ("fe80::1%eth0", "fe80::/64"),
        ("", ""),
        ("testclient", "testclient"),
    ],
)
def test_strangers_are_counted_by_what_one_customer_has(address: str, network: str) -> None:
    assert network_of(address) == network
