"""Rates and times to come: what may be said at a moment, and what may not."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from preparation.stages import Overview, Stage, Upcoming


class Clock:
    """Seconds pass when the test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


Begin = Callable[[str, int], Stage]


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def begin(clock: Clock) -> Begin:
    return lambda name, total: Stage(name, total, clock, threading.Event())


def advance(clock: Clock, stage: Stage, seconds: int, rate: int, every: int = 1) -> None:
    """`rate` bytes a second for some seconds, arriving `every` so many of them."""
    for _ in range(0, seconds, every):
        clock.now += every
        stage.advance(rate * every)


def test_rate_is_that_of_the_last_half_minute_and_not_of_the_whole(
    begin: Begin, clock: Clock
) -> None:
    stage = begin("Download", 10**9)
    advance(clock, stage, 300, rate=1_000_000)
    advance(clock, stage, 60, rate=100_000)
    assert stage.rate() == 100_000
    assert stage.remaining() == (10**9 - stage.done) / 100_000


def test_many_small_arrivals_give_the_same_rate_as_few_large_ones(
    begin: Begin, clock: Clock
) -> None:
    stage = begin("Download", 10**9)
    for _ in range(100_000):
        clock.now += 0.001
        stage.advance(1000)
    assert stage.rate() == pytest.approx(1_000_000, rel=0.05)


def test_rate_of_what_stands_still_falls_to_nothing(begin: Begin, clock: Clock) -> None:
    stage = begin("Download", 10**9)
    advance(clock, stage, 100, rate=1_000_000)
    clock.now += 15
    assert stage.rate() == pytest.approx(500_000, rel=0.1)
    clock.now += 60
    assert stage.rate() == 0
    assert stage.remaining() is None


def test_rare_arrivals_are_neither_standstill_nor_haste(begin: Begin, clock: Clock) -> None:
    # given 32 MiB every 40 seconds, as the parts of an upload over a slow line
    stage = begin("Upload", 10**10)
    rates = []
    for _ in range(20):
        advance(clock, stage, 40, rate=800_000, every=40)
        for _ in range(4):
            rates.append(stage.rate())
            clock.now += 9.9
        clock.now -= 39.6
    # then
    assert all(rate is not None and 350_000 < rate < 900_000 for rate in rates)
    assert all(rate is not None and 650_000 < rate < 900_000 for rate in rates[-40:])


def test_transfer_that_begins_again_takes_its_bytes_back_and_no_rate_is_negative(
    begin: Begin, clock: Clock
) -> None:
    stage = begin("Download", 10**9)
    advance(clock, stage, 60, rate=1_000_000)
    stage.advance(-50_000_000)
    assert stage.done == 10_000_000
    assert stage.rate() == 1_000_000
    stage.advance(-20_000_000)  # more than had come
    advance(clock, stage, 60, rate=1_000_000)
    assert stage.rate() == 1_000_000
    assert stage.remaining() == (10**9 - 50_000_000) / 1_000_000


def test_nothing_is_foretold_in_the_first_moments_or_beyond_the_end(
    begin: Begin, clock: Clock
) -> None:
    stage = begin("Hash", 100)
    assert stage.rate() is None
    advance(clock, stage, 2, rate=10)
    assert stage.rate() == 10
    assert stage.remaining() is None
    advance(clock, stage, 2, rate=10)
    assert stage.remaining() == 6
    advance(clock, stage, 10, rate=10)  # more than was announced
    assert stage.remaining() is None


THREE = (Upcoming("Download", 300), Upcoming("Hash", 300), Upcoming("Upload", 300, at_most=True))


def do(overview: Overview, begin: Begin, clock: Clock, name: str, rate: int) -> None:
    stage = begin(name, 300)
    overview.begin(stage)
    advance(clock, stage, 300 // rate, rate=rate)
    overview.end(stage, finished=True)


def test_whole_of_one_model_is_foretold_in_its_last_stage_alone(begin: Begin, clock: Clock) -> None:
    overview = Overview(clock)
    overview.expect(THREE)
    for name in ("Download", "Hash"):
        overview.begin(stage := begin(name, 300))
        advance(clock, stage, 10, rate=10)
        assert stage.remaining() == 20
        assert overview.remaining() is None  # who knows how fast the bucket is
        overview.end(stage, finished=True)
        assert overview.remaining() is None
    overview.begin(stage := begin("Upload", 300))
    advance(clock, stage, 10, rate=10)
    assert overview.remaining() == 20


def test_whole_of_several_models_is_foretold_once_each_kind_of_stage_was_measured(
    begin: Begin, clock: Clock
) -> None:
    overview = Overview(clock)
    overview.expect(THREE, [THREE])
    do(overview, begin, clock, "Download", 10)  # 30 seconds
    do(overview, begin, clock, "Hash", 100)  # 3
    overview.begin(upload := begin("Upload", 300))
    advance(clock, upload, 5, rate=50)
    assert overview.remaining() is None
    overview.end(upload, finished=True)
    overview.expect(THREE)
    overview.begin(stage := begin("Download", 300))
    advance(clock, stage, 20, rate=10)
    # 10 seconds of this one, 3 of hashing, and the upload at 50 bytes a second
    assert overview.remaining() == 10 + 3 + 6


def test_what_was_skipped_in_no_time_foretells_nothing(begin: Begin, clock: Clock) -> None:
    overview = Overview(clock)
    overview.begin(stage := begin("Hash", 300))
    stage.advance(300)  # remembered from an earlier run
    overview.end(stage, finished=True)
    overview.expect([Upcoming("Download", 300), Upcoming("Hash", 300)])
    overview.begin(stage := begin("Download", 300))
    advance(clock, stage, 20, rate=10)
    assert overview.remaining() is None


def test_stage_that_is_passed_over_is_no_longer_to_come(begin: Begin, clock: Clock) -> None:
    overview = Overview(clock)
    overview.expect([*THREE[:1], Upcoming("Check", 0), *THREE[1:]])
    assert [stage.name for stage in overview.to_come] == ["Download", "Hash", "Upload"]
    overview.begin(begin("Unpack", 10))  # nobody foresaw it
    assert [stage.name for stage in overview.to_come] == ["Download", "Hash", "Upload"]
    overview.begin(begin("Hash", 300))
    assert [stage.name for stage in overview.to_come] == ["Upload"]
